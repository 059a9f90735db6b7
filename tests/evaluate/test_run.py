"""Whole evaluations on the bundled model: equal to the harness's own, resumable, honest about what they left out."""

import json
import math
import re

import pytest
from typer.testing import CliRunner

import dejavu
from dejavu.cli.main import app
from dejavu.errors import ConfigError
from dejavu.evaluate import report
from dejavu.evaluate.harness import DejavuLM
from dejavu.evaluate.run import Evaluation
from dejavu.evaluate.scores import SCORES_FILE, Scores
from dejavu.evaluate.settings import make_engines, parse_setting
from dejavu.evaluate.tasks import read_local

TASKS = ("lambada", "piqa", "winogrande", "pairs")
SETTINGS = ("dense", "exact", "pack=opt-mini")


@pytest.fixture(scope="module")
def engines(base):
    return make_engines([parse_setting(s) for s in SETTINGS], lambda _: base)


@pytest.fixture(scope="module")
def result(base, engines, data):
    return Evaluation(base, [*TASKS, "prose"], data_dir=data, window=64).run(engines)


def test_dense_scores_are_those_of_the_harness_own_model(result, harness, data):
    tasks = [read_local(name, data / f"{name}.jsonl").build(None) for name in TASKS]
    theirs = harness(tasks)
    for name in TASKS:
        for metric, row in result["tasks"][name]["metrics"].items():
            assert row["dense"]["value"] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-4), (name, metric)


def test_few_shot_prompts_are_those_of_the_harness(base, engines, harness, data):
    dense = {"dense": engines["dense"]}
    ours = Evaluation(base, ["lambada", "piqa"], data_dir=data, num_fewshot=2).run(dense, speed=False)["tasks"]
    tasks = [read_local(name, data / f"{name}.jsonl").build(2) for name in ("lambada", "piqa")]
    theirs = harness(tasks)
    for name, metric in (("lambada", "perplexity"), ("lambada", "acc"), ("piqa", "acc_norm")):
        value = ours[name]["metrics"][metric]["dense"]["value"]
        assert value == pytest.approx(theirs[name][f"{metric},none"], rel=1e-4)


def test_perplexity_of_text_is_the_harness_rolling_one(base, result, harness, data):
    class Text:
        args = ((data / "prose.detok.txt").read_text(),)

    rolling = harness.model.loglikelihood_rolling([Text()], disable_tqdm=True)[0]
    prose = Evaluation(base, ["prose"], data_dir=data).run({"dense": base}, speed=False)["tasks"]["prose"]
    for level in ("word", "byte"):
        count = prose[f"{level}s"]
        value = prose["metrics"][f"{level}_perplexity"]["dense"]["value"]
        assert value == pytest.approx(math.exp(-rolling / count), rel=1e-4)
    assert result["tasks"]["prose"]["words"] == len(Text.args[0].split())


def test_exact_is_dense_and_sparse_is_not(result):
    for name, task in result["tasks"].items():
        to = task["to_reference"]
        assert to["exact"]["agreement"] == 1 and abs(to["exact"]["kl"]) < 1e-6, name
        assert to["pack=opt-mini"]["kl"] > 1e-5, name
        for row in task["metrics"].values():
            assert row["exact"]["value"] == row["dense"]["value"] and row["exact"]["difference"] == 0
    reads = result["reads"]
    assert set(reads["dense"]["mlp"]) == {1.0}
    assert max(reads["pack=opt-mini"]["mlp"]) < 1 and 0.5 < min(reads["pack=opt-mini"]["mlp_recall"]) < 1
    size = {name: decode["bytes_per_token"] for name, decode in result["decode"].items()}
    assert size["pack=opt-mini"] < size["exact"] < size["dense"]
    assert all(decode["ms_per_token"] > 0 for decode in result["decode"].values())
    json.dumps(result, allow_nan=False)


def test_decode_steps_give_the_same_scores(base, engines, result, data):
    some = {name: engines[name] for name in ("dense", "pack=opt-mini")}
    stepped = Evaluation(base, ["piqa", "prose"], data_dir=data, window=64).run(some, path="steps", speed=False)
    for name in ("piqa", "prose"):
        for metric, row in stepped["tasks"][name]["metrics"].items():
            for setting in some:
                expected = result["tasks"][name]["metrics"][metric][setting]["value"]
                assert row[setting]["value"] == pytest.approx(expected, rel=1e-3)
    assert stepped["reads"]["pack=opt-mini"]["mlp_recall"] is None and stepped["path"] == "steps"


def without_times(result):
    return {k: v for k, v in result.items() if k not in ("seconds", "scoring_seconds", "decode")}


def test_a_stopped_run_goes_on(base, engines, result, data, tmp_path, monkeypatch):
    out, scored = tmp_path / "out", []
    real = Scores._score

    def score(self, chunk, done):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(chunk)
        return real(self, chunk, done)

    monkeypatch.setattr(Scores, "_score", score)
    job = Evaluation(base, [*TASKS, "prose"], data_dir=data, window=64)
    monkeypatch.setattr("dejavu.evaluate.scores.LOGITS", 64 * base.config.vocab_size)
    with pytest.raises(KeyboardInterrupt):
        job.run(engines, output=out, speed=False)
    with (out / SCORES_FILE).open("a") as file:
        file.write('{"keys": ["half a li')  # what a kill leaves
    scored.clear()
    monkeypatch.setattr(Scores, "_score", lambda self, chunk, done: scored.append(chunk) or real(self, chunk, done))
    again = job.run(engines, output=out, speed=False)
    whole = sum(1 for line in (out / SCORES_FILE).open()) - 1
    assert 0 < len(scored) == whole - 2
    for name, task in result["tasks"].items():
        for metric, row in task["metrics"].items():
            for setting in SETTINGS:
                assert again["tasks"][name]["metrics"][metric][setting]["value"] == pytest.approx(
                    row[setting]["value"], rel=1e-5
                )
    assert without_times(again) == without_times(json.loads((out / "results.json").read_text()))
    with pytest.raises(ConfigError, match="another model, setting or method"):
        job.run({"dense": base}, speed=False, output=out)
    job.run({"dense": base}, speed=False, output=out, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ConfigError, match="holds files that are no evaluation"):
        job.run(engines, output=tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be written"):
        job.run(engines, output=tmp_path / "other" / "file")


def test_long_and_empty_documents_are_counted(base, data, tmp_path):
    rows = [{"context": "A word " * 1100, "continuation": "again"}, {"context": "The", "continuation": " "},
            {"context": "It was a", "continuation": "day"}]  # fmt: skip
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = Evaluation(base, ["long"], data_dir=tmp_path).run({"dense": base}, speed=False)
    task = found["tasks"]["long"]
    assert (task["documents"], task["empty"], task["truncated"]) == (2, 1, 1)
    assert any("1 documents are empty" in note for note in report.notes(found))
    assert any("1 requests were longer than the context" in note for note in report.notes(found))


def test_harness_loads_our_model_by_its_arguments(engines, result, harness, data):
    task = read_local("piqa", data / "piqa.jsonl").build(None)
    model = DejavuLM.create_from_arg_string(
        "pretrained=opt-mini,pack=opt-mini,dtype=fp32", {"batch_size": 1, "device": None}
    )
    found = harness([task], model)["piqa"]
    assert found["acc_norm,none"] == result["tasks"]["piqa"]["metrics"]["acc_norm"]["pack=opt-mini"]["value"]

    class Ask:
        args = ("The river rises in the", {"until": [" of"], "max_gen_toks": 12})

    made = model.generate_until([Ask()])[0]
    assert made == model.engine.generate(Ask.args[0], max_new_tokens=12, stop=(" of",)).text and " of" not in made


def cli(*args):
    return CliRunner().invoke(app, list(args))


def test_eval_from_the_command_line(data, tmp_path):
    shown = cli("eval", "--pack", "opt-mini", "--tasks", "piqa,prose", "--data-dir", str(data), "--limit", "2")
    assert shown.exit_code == 0, shown.output
    assert "difference [95 %]" in shown.stdout and "tested to equal decode steps" in shown.stdout
    assert "pack opt-mini: heads" in shown.stdout and "bootstrap" not in shown.output
    text = ("--text", str(data / "prose.detok.txt"), "--text-tokens", "9")
    made = json.loads(cli("eval", "--mode", "dense", *text, "--json", "--no-speed").stdout)
    assert made["tasks"]["prose"]["tokens"] == 9 and made["decode"]["dense"]["ms_per_token"] is None
    plain = cli("eval", "--mode", "dense", *text, "--no-speed")
    assert plain.exit_code == 0 and "Read by layer" not in plain.stdout


def test_progress_without_a_terminal_is_a_line_now_and_then(data, monkeypatch):
    monkeypatch.setattr("dejavu.cli.evaluate.LINE_S", 0)
    shown = cli("eval", "--mode", "exact", "--text", str(data / "prose.detok.txt"), "--window", "40", "--no-speed")
    first, last = shown.stderr.splitlines()
    assert re.fullmatch(r"scored \d+ of \d+ tokens, 0:00:\d\d left", first)
    assert last.endswith(", 0:00:00 left") and last.split()[1] == last.split()[3]


def test_compare_from_the_command_line(data, tmp_path):
    out = tmp_path / "out"
    args = ("exact", "policy=oracle,mlp=0.05", "--tasks", "pairs", "--data-dir", str(data), "-o", str(out))
    shown = cli("compare", *args)
    assert shown.exit_code == 0, shown.output
    assert {f.name for f in out.iterdir()} == {"scores.jsonl", "results.json", "compare.png", "compare.svg"}
    result = json.loads((out / "results.json").read_text())
    assert result["reference"] == "exact" and result["model"] == "opt-mini" and len(result["checkpoint_hash"]) == 64


@pytest.mark.parametrize("args, message", [
    (("eval",), "at least one task or text"),
    (("eval", "--quality", "1%", "--text", "x"), "name a --pack"),
    (("eval", "--pack", "opt-mini", "--policy", "oracle"), "either --pack or --policy"),
    (("eval", "--tasks", "piga", "--data-dir", "DATA"), "did you mean piqa"),
    (("eval", "--tasks", "hellaswagg"), "did you mean hellaswag"),
    (("eval", "--tasks", "piqa", "--data-dir", "DATA", "--limit", "0"), "limit must be"),
    (("eval", "--tasks", "prose", "--data-dir", "DATA", "--stride", "2000"), "stride 2000"),
    (("eval", "--tasks", "prose", "--data-dir", "DATA", "--path", "magic"), "path 'magic'"),
    (("eval", "--tasks", "prose", "--data-dir", "DATA", "--text", "prose.txt"), "has the same name, 'prose'"),
    (("eval", "--tasks", "piqa", "--data-dir", "DATA", "--text", "piqa.txt"), "there is a task 'piqa' already"),
    (("compare", "fast", "--text", "x"), "'fast' is neither a mode"),
    (("compare", "dense", "dense", "--text", "x"), "given twice"),
])  # fmt: skip
def test_bad_input_is_one_line(args, message, data):
    made = cli(*(str(data) if a == "DATA" else a for a in args))
    assert made.exit_code == 1 and message in made.stderr and made.stderr.count("\n") == 1, made.output


def test_help_shows_an_example():
    for verb in ("eval", "compare"):
        assert f"dejavu {verb}" in cli(verb, "--help").stdout
    assert dejavu.__version__
