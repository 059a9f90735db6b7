"""The harness's own tasks, over rows of ours in the place of the data sets that it would download."""

import datasets
import pytest

from dejavu.errors import ConfigError
from dejavu.evaluate.run import Evaluation
from dejavu.evaluate.tasks import hub_tasks

ARC = [{"question": "What melts in the sun?", "choices": {"text": ["ice", "a stone", "iron"], "label": ["A", "B", "C"]},
        "answerKey": "A"},
       {"question": "Which animal flies?", "choices": {"text": ["the cow", "the owl", "the fish"],
                                                       "label": ["A", "B", "C"]}, "answerKey": "B"}]  # fmt: skip
# By the path and name of the data set: rows as its owners write them.
ROWS = {
    "EleutherAI/lambada_openai": [{"text": "The baker opened the oven and took out the bread"},
                                  {"text": "In the winter the lake was covered with ice"}],
    "baber/piqa": [{"goal": "Warm your hands", "sol1": "Rub them.", "sol2": "Put them in ice.", "label": 0},
                   {"goal": "Put out a candle", "sol1": "Light it.", "sol2": "Blow on it.", "label": 1}],
    "Rowan/hellaswag": [{"activity_label": "Cooking", "ctx_a": "A man cuts an onion.", "ctx_b": "he", "label": "1",
                         "endings": ["sings to the wall.", "puts it into a pan.", "flies.", "swims."]},
                        {"activity_label": "Sports", "ctx_a": "A girl runs.", "ctx_b": "she", "label": "0",
                         "endings": ["jumps over a bar.", "eats a door.", "is a tree.", "melts."]}],
    "allenai/winogrande": [{"sentence": "The cup fell off the shelf since the _ was not level.", "option1": "cup",
                            "option2": "shelf", "answer": "2"},
                           {"sentence": "Tom thanked Bill because _ had helped.", "option1": "Tom", "option2": "Bill",
                            "answer": "2"}],
    "aps/super_glue copa": [{"premise": "The man was cold.", "choice1": "He put on a coat.", "choice2": "He sang.",
                             "question": "effect", "label": 0},
                            {"premise": "The glass broke.", "choice1": "It was blue.", "choice2": "It fell.",
                             "question": "cause", "label": 1}],
    "aps/super_glue cb": [{"premise": "It rained all day.", "hypothesis": "it was wet", "label": 0},
                          {"premise": "She says he left.", "hypothesis": "he stayed", "label": 1}],
    "aps/super_glue boolq": [{"passage": "Ice is frozen water.", "question": "is ice made of water", "label": 1},
                             {"passage": "The sun is a star.", "question": "is the sun a planet", "label": 0}],
    "nyu-mll/glue rte": [{"sentence1": "A dog barked.", "sentence2": "An animal barked.", "label": 0},
                         {"sentence1": "A dog barked.", "sentence2": "A cat barked.", "label": 1}],
    "allenai/openbookqa": [{"question_stem": row["question"], **row} for row in ARC],
    "allenai/ai2_arc ARC-Easy": ARC,
    "allenai/ai2_arc ARC-Challenge": ARC,
    "nyu-mll/blimp adjunct_island": [{"sentence_good": "The dogs were asleep.", "sentence_bad": "The dogs was asleep."},
                                     {"sentence_good": "The house is old.", "sentence_bad": "The house are old."}],
    "EleutherAI/wikitext_document_level": [{"page": " = The Mill = \n The old mill stood by the river ."},
                                           {"page": " = The Lake = \n In the winter the lake was frozen ."}],
}  # fmt: skip
TASKS = ("lambada_openai", "piqa", "hellaswag", "winogrande", "copa", "openbookqa", "rte", "cb", "arc_easy",
         "arc_challenge", "boolq", "blimp_adjunct_island", "wikitext")  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    def load(path, name=None, **_):
        rows = ROWS.get(f"{path} {name}") or ROWS[path]
        return datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in ("train", "validation", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.filterwarnings("ignore:F-score is ill-defined")
def test_every_task_scores_as_with_the_harness_own_model(hub, base, harness):
    ours = Evaluation(base, TASKS).run({"dense": base}, speed=False)["tasks"]
    assert list(ours) == list(TASKS)
    theirs = harness(list(hub_tasks(TASKS, None).values()))
    for name in TASKS:
        assert ours[name]["metrics"] and ours[name]["documents"] == 2
        for metric, row in ours[name]["metrics"].items():
            assert row["dense"]["value"] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-4), (name, metric)
    assert {"word_perplexity", "byte_perplexity", "bits_per_byte"} <= ours["wikitext"]["metrics"].keys()


def test_examples_stand_before_a_document(hub, base):
    asked = {}
    for shots in (0, 1):
        job = Evaluation(base, ["boolq"], num_fewshot=shots)
        asked[shots] = job.run({"dense": base}, speed=False) and sum(r.length for r in job._requests())
    assert asked[1] > 1.5 * asked[0]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match=r"piqa: the data cannot be loaded .*no route.*give --data-dir"):
        hub_tasks(["piqa"], None)
