"""Generation tasks mean what they mean to the harness's own Hugging Face model, or are refused before anything runs."""

import json

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from dejavu.errors import ConfigError
from dejavu.evaluate import report
from dejavu.evaluate.generation import DEFAULTS, checkpoint_defaults, sampling
from dejavu.evaluate.harness import Collect, DejavuLM, FromScores
from dejavu.evaluate.run import Evaluation

CONTEXT = "The old mill stood by the river for two hundred years. In the"


def ask(model, *settings, context=CONTEXT):
    requests = [Instance("generate_until", {}, (context, dict(s)), i) for i, s in enumerate(settings)]
    return model.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def ours(base):
    return FromScores(base, None, "dense")


@pytest.mark.parametrize("settings", [
    {"until": ["\n\n"], "max_gen_toks": 12},
    {"until": " the", "max_gen_toks": 30, "do_sample": False, "temperature": 0.7},
    {"until": ["\n\n"], "max_gen_toks": 12, "repetition_penalty": 1.5},
    {"until": [], "max_new_tokens": 9, "top_p": 0.9, "top_k": 3, "do_sample": False},
    {"until": ["."], "max_tokens": 9, "max_new_tokens": 5, "min_p": 0.1},
    {"until": ["."], "max_completion_tokens": 7, "num_beams": 1},
    {"max_length": 24},
    {"until": ["\n", ""], "max_gen_toks": 20},
], ids=lambda s: "-".join(s))  # fmt: skip
def test_greedy_text_is_that_of_the_harness_own_model(ours, harness, settings):
    # Its batch is padded to the longest prompt, from which it counts max_length; here all have one length.
    assert ask(ours, settings) == ask(harness.model, settings)


def test_a_sampled_request_draws_as_hugging_face_would(base, ours):
    settings = {"until": [], "max_gen_toks": 8, "temperature": 0.8, "do_sample": True, "seed": 3}
    drawn = ask(ours, settings, settings)
    how = {"max_new_tokens": 8, "temperature": 0.8, "top_k": 50, "stop": "</s>"}
    prompt = ours.tok_encode(CONTEXT)
    # A task that repeats its requests counts how often they agree, so each repetition draws anew.
    assert drawn == [base.generate(prompt, seed=seed, **how).text for seed in (3, 4)]
    assert drawn[0] != drawn[1]
    assert ask(ours, settings) == drawn[:1]


def test_what_a_task_leaves_open_the_checkpoint_says(tmp_path):
    assert checkpoint_defaults(tmp_path) == DEFAULTS
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.8, "top_k": None, "max_length": 3}))
    defaults = checkpoint_defaults(tmp_path)
    assert defaults == DEFAULTS | {"top_p": 0.8}
    params = sampling({"temperature": 0.5, "top_k": 0}, defaults, "</s>")
    assert (params.top_p, params.top_k, params.max_new_tokens, params.stop) == (0.8, None, 256, ("</s>",))


BAD = [
    ({"num_beams": 4}, "num_beams=4 is not supported"),
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
    ({"typical": 1}, "typical=1"),
    ({"do_sample": True}, "do_sample needs a temperature"),
    ({"do_sample": "yes"}, "do_sample must be true or false"),
    ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
    ({"max_gen_toks": 2.5}, "new tokens must be an integer, found 2.5"),
    ({"max_gen_toks": 1 << 20}, "leaves no room for a prompt"),
    ({"max_length": 3}, "max_length 3 leaves no room"),
    ({"temperature": 1, "top_p": 2}, "top_p must be"),
    ({"repetition_penalty": 0}, "repetition_penalty must be"),
]


@pytest.mark.parametrize("settings, message", BAD)
def test_what_is_not_supported_is_refused_by_name(base, settings, message):
    with pytest.raises(ConfigError, match=message):
        ask(Collect(base), {"max_gen_toks": 8} | settings)


def generating(**settings) -> ConfigurableTask:
    import datasets

    rows = [{"question": f"{CONTEXT} {season}", "answer": "water"} for season in ("spring", "winter")]
    return ConfigurableTask(config={
        "task": "seasons", "test_split": "test", "output_type": "generate_until",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6} | settings,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    })  # fmt: skip


def test_an_evaluation_refuses_before_it_touches_anything(base, data, tmp_path, monkeypatch):
    job = Evaluation(base, ["pairs"], data_dir=data)
    job.tasks["seasons"] = generating(num_beams=2)
    monkeypatch.setattr("dejavu.evaluate.scores.Scores.compute", lambda *_: pytest.fail("scored"))
    with pytest.raises(ConfigError, match="num_beams=2"):
        job.run({"dense": base}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_of_the_harness_generates(harness):
    model = DejavuLM.create_from_arg_string("pretrained=opt-mini,dtype=fp32,mode=dense", {"batch_size": 1})
    task = {"seasons": generating(repetition_penalty=1.3)}
    assert harness([task["seasons"]], model)["seasons"] == harness([generating(repetition_penalty=1.3)])["seasons"]


def test_a_task_that_only_generates_is_timed_and_drawn(base, data, tmp_path):
    """It has no request to take a prompt from, and a metric of its own."""
    job = Evaluation(base, ["pairs"], data_dir=data)
    job.tasks = {"seasons": generating()}
    settings = {"dense": base, "exact": base.with_mode("exact")}
    result = job.run(settings, output=tmp_path)
    assert all(decode["ms_per_token"] > 0 for decode in result["decode"].values())
    result["tasks"]["seasons"]["metrics"] = {"chrf": result["tasks"]["seasons"]["metrics"]["exact_match"]}
    assert {file.name for file in report.save_figure(result, tmp_path)} == {"compare.png", "compare.svg"}
    assert report.tables(result)
    result["tasks"]["seasons"]["metrics"] = {}
    assert report.save_figure(result, tmp_path) == []
