"""A folder of small task files in every format, in our own words."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

import dejavu
from dejavu.checkpoint.source import open_checkpoint

ROWS = {
    "lambada": [
        {"context": "The baker opened the oven and took out the", "continuation": "bread"},
        {"context": "She wrote a letter to her mother and sent the", "continuation": "letter"},
        {"context": "He sat down at the piano and began to", "continuation": "play"},
        {"context": "In the winter the lake was covered with", "continuation": "ice"},
    ],
    "piqa": [
        {"query": "Question: How are hands warmed?\n", "choices": ["Rub them.", "Put them in ice."], "gold": 0},
        {"query": "Question: How is a candle put out?\n", "choices": ["Light it.", "Blow on the flame."], "gold": 1},
        {"query": "Question: How do I dry a towel?\n", "choices": ["Wash it.", "Hang it in the sun."], "gold": 1},
    ],
    "winogrande": [
        {"context_options": ["The cup fell off the shelf since the cup", "The cup fell off the shelf since the shelf"],
         "continuation": "was not level.", "gold": 1},
        {"context_options": ["Tom thanked Bill because Tom", "Tom thanked Bill because Bill"],
         "continuation": "had helped.", "gold": 1},
    ],
    "pairs": [
        {"sentence_good": "The dogs were asleep.", "sentence_bad": "The dogs was asleep."},
        {"sentence_good": "Many girls insulted themselves.", "sentence_bad": "Many girls insulted herself."},
        {"sentence_good": "The house is old.", "sentence_bad": "The house are old."},
    ],
}  # fmt: skip
PROSE = """The old mill stood by the river for two hundred years. In the spring the water rose to the door, and the
miller carried the sacks up to the second floor. When the railway came to the valley, the farmers sold their grain in
the town, and the wheel stopped."""


FOLDERS = ("lambada", "piqa", "hellaswag", "winogrande", "super_glue", "glue/rte", "openbookqa", "arc", "blimp",
           "wikitext")  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def few_tasks():
    """The harness's index holds the tasks that we name; one of all its tasks takes many seconds."""
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in FOLDERS]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dejavu.evaluate.tasks._manager", lambda: manager)
        yield manager


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prose.detok.txt").write_text(PROSE)
    return folder


@pytest.fixture(scope="session")
def base() -> dejavu.Engine:
    return dejavu.load("opt-mini", dtype="fp32", mode="dense")


@pytest.fixture(scope="session")
def harness(few_tasks):
    """`harness(tasks, model)`: results of the harness's own evaluation, as a rule of its Hugging Face model."""
    path = str(open_checkpoint("opt-mini").path)
    hugging_face = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=2)

    def evaluate(tasks, model=hugging_face) -> dict:
        return simple_evaluate(model, tasks=tasks, bootstrap_iters=0, task_manager=few_tasks)["results"]

    evaluate.model = hugging_face
    return evaluate
