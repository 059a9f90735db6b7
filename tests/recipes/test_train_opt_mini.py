"""The recipe on a tiny model: it learns, a killed run goes on exactly, and bad input is named."""

import gzip
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
    "seq_len": 16, "batch": 4, "micro_batch": 2, "steps": 6, "warmup": 2, "val_tokens": 200, "eval_every": 3,
    "checkpoint_every": 2, "lr": 1e-2, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import train_opt_mini

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small matrices are slower on more
    yield train_opt_mini
    torch.set_num_threads(threads)
    for name in ("train_opt_mini", "corpus"):
        sys.modules.pop(name)


@pytest.fixture
def text(tmp_path) -> Path:
    """Documents of random words, so that there is something to learn but nothing to memorise."""
    words, draw = ["sun", "moon", "tide", "salt", "gull", "wave", "foam", "wind"], random.Random(0)
    documents = [" ".join(draw.choices(words, k=60)) for _ in range(30)]
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    return path


def test_a_killed_run_goes_on_to_the_same_weights(recipe, text, tmp_path, monkeypatch):
    whole, broken = ({**SIZES, "text": str(text), "out": str(tmp_path / name)} for name in ("whole", "broken"))
    expected = recipe.train(recipe.Recipe(**whole))

    steps, last = [], 4

    def learning_rate(self, step):
        steps.append(step)
        if step > last:
            raise KeyboardInterrupt
        return original(self, step)

    original = recipe.Recipe.learning_rate
    monkeypatch.setattr(recipe.Recipe, "learning_rate", learning_rate)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(recipe.Recipe(**broken))
    assert not (tmp_path / "broken" / "model.safetensors").exists()

    last = 5
    result = recipe.train(recipe.Recipe(**broken))
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5]  # killed in step 5, it went on from the checkpoint after step 3
    assert result == expected
    for name in ("model.safetensors", "run/checkpoint.safetensors"):
        ours, theirs = load_file(tmp_path / "broken" / name), load_file(tmp_path / "whole" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_it_learns_and_writes_a_model_that_transformers_reads(recipe, text, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    zipped, out = tmp_path / "text.txt.gz", tmp_path / "out"
    zipped.write_bytes(gzip.compress(text.read_bytes()))
    settings = {**SIZES, "steps": 60, "eval_every": 60}
    flags = [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert recipe.main(["--text", str(zipped), "--out", str(out), *flags]) == 0
    printed = capsys.readouterr()
    first = float(printed.err.split("validation loss ")[1].split(",")[0])
    assert json.loads(printed.out)["loss"] < 0.8 * first  # from about ln(300) towards the 8 words' own entropy

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert (model.config.hidden_size, model.config.ffn_dim, model.config.num_hidden_layers) == (16, 32, 2)
    assert tokenizer.bos_token_id == model.config.bos_token_id == 0
    assert tokenizer.decode(tokenizer("salt and sea")["input_ids"]) == "salt and sea"
    # The export is the checkpoint's weights, rounded once.
    last = load_file(out / "run" / "checkpoint.safetensors")
    assert all(torch.equal(t, last[k].bfloat16()) for k, t in load_file(out / "model.safetensors").items())


def test_documents_begin_with_the_boundary_token(recipe, text, tmp_path):
    import corpus

    tokenizer = corpus.load_tokenizer(tmp_path / "tokenizer.json", "", str(text), 300)
    tokens = corpus.load_tokens(tmp_path / "tokens.npy", tokenizer, str(text))
    documents = text.read_text().strip().split("\n<|endoftext|>\n")
    assert tokens[0] == 0
    assert (tokens == 0).sum() == len(documents)
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:] == documents


def test_a_pass_shows_every_window_once(recipe):
    import corpus
    import numpy as np

    windows = corpus.Windows(np.arange(50), 7, seed=3)
    assert len(windows) == 7
    first, second = windows.batch(0, 7), windows.batch(7, 7)
    for batch in (first, second):
        assert sorted(batch[:, 0].tolist()) == list(range(0, 49, 7))
        assert torch.equal(batch, batch[:, :1] + torch.arange(8))
    assert not torch.equal(first, second)
    assert torch.equal(windows.batch(5, 4), torch.cat([first, second])[5:9])


def test_the_learning_rate_rises_stays_and_falls(recipe):
    settings = recipe.Recipe(text="", out="")
    rate = settings.learning_rate
    assert rate(0) == pytest.approx(2e-3 / 200)
    assert rate(199) == rate(3900) == pytest.approx(2e-3)
    assert rate(4 * 6606 // 5) == pytest.approx(2e-3 * (1 - 0.98 / 2), rel=1e-3)  # half way down, to within a step
    assert rate(6605) == pytest.approx(2e-3 * 0.02)


def test_bad_input_is_one_clear_error(recipe, text, tmp_path, capsys):
    def fails(**changes) -> str:
        flags = {**SIZES, "text": text, "out": tmp_path / "bad"} | changes
        assert recipe.main([x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", str(v))]) == 1
        return capsys.readouterr().err.strip()

    assert "no-such.txt" in fails(text=tmp_path / "no-such.txt")
    assert "multiple of num_attention_heads" in fails(num_attention_heads=3)
    assert "steps must be at least 1" in fails(steps=0)
    assert "too few" in fails(val_tokens=10**6, out=tmp_path / "short")
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (tmp_path / "other.json").write_text(json.dumps({"version": "1.0", "model": model}))
    assert "no <|endoftext|> token" in fails(tokenizer=tmp_path / "other.json", out=tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"lr": 1.0}))
    assert "lr 1.0 there and 0.01 here" in fails(out=tmp_path)
