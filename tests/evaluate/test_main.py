"""`python -m dejavu.evaluate` end to end, offline: the harness's own command line over a task of a folder."""

import json
import os
import subprocess
import sys

import pytest

import dejavu

ROWS = [{"question": "The river rises in the", "answer": "hills"}, {"question": "The wheel", "answer": "stopped"}]
TASKS = {
    "few_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["{{answer}}", "seventeen blue"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "few_words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, repetition_penalty: 1.2}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def evaluate(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{text}")
    out = tmp_path / "out"

    def run() -> tuple[subprocess.CompletedProcess, list[dict]]:
        command = [sys.executable, "-m", "dejavu.evaluate", "--model", "dejavu", "--model_args",
                   "pretrained=opt-mini,dtype=fp32,mode=dense,threads=1", "--tasks", ",".join(TASKS),
                   "--include_path", str(tmp_path), "--output_path", str(out), "--log_samples"]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
        return done, [json.loads(file.read_text()) for file in out.rglob("results_*.json")]

    run.samples = lambda name: [
        json.loads(line) for file in out.rglob(f"samples_{name}_*.jsonl") for line in file.read_text().splitlines()
    ]
    return run


def test_the_harness_own_command_line_evaluates_us(evaluate):
    done, (results,) = evaluate()
    assert done.returncode == 0, done.stderr
    assert set(results["results"]) == set(TASKS)
    assert len(evaluate.samples("few_choices")) == len(evaluate.samples("few_words")) == len(ROWS)
    engine = dejavu.load("opt-mini", dtype="fp32", mode="dense")
    for sample in evaluate.samples("few_words"):
        ids = engine.tokenizer.encode_plain(sample["doc"]["question"], special=True)
        made = engine.generate(ids, max_new_tokens=6, stop=".", repetition_penalty=1.2)
        assert sample["resps"] == [[made.text]]
