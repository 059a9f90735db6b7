"""The benchmark scripts on tiny models, and what they refuse to do."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from dejavu.bench import shapes
from dejavu.kernels import backend

TINY = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 500}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """`script(name)` imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["opt-125m"] | TINY)
    names = []

    def load(name):
        names.append(name)
        return import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def model(make_checkpoint):
    """`model(family)` makes a checkpoint with a tokenizer of single bytes and a context of 256 tokens."""

    def make(family: str) -> Path:
        folder = make_checkpoint(family, vocab_size=300, max_position_embeddings=256)
        letters = {"<|endoftext|>": 0} | {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
        tokenizer = Tokenizer(models.BPE(letters, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return folder

    return make


def run(module, *flags):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    return CliRunner().invoke(app, [str(flag) for flag in flags])


@pytest.mark.parametrize("memory_share", [0.8, 0.0], ids=["side by side", "one at a time"])
def test_decode_cpu_measures_both_in_one_run(script, monkeypatch, memory_share):
    module, ops, told = script("decode_cpu"), backend("cpu"), []
    monkeypatch.setattr(module, "MEMORY_SHARE", memory_share)
    monkeypatch.setattr(module, "read_bandwidth", lambda ops: 1e9)
    subject = module.shape_subject("tiny", ops, seed=0, mlp_density=0.25)
    fields = module.measure(subject, ops, 4, 3, 2, False, told.append)
    assert fields["side_by_side"] == (memory_share > 0)
    assert told[-4:] == [f"round 2/2: {name}" for name in ("second per byte", "dense", "exact", "HF eager")]

    results = fields["results"]
    assert list(results) == ["dense", "exact", "HF eager"]
    dense, exact, eager = results.values()
    total = sum(dense["bytes_per_token"].values())
    # Two layers of 12 C^2 weights and the head, in bf16; the rest is biases, norms and keys.
    assert total == pytest.approx(2 * (2 * 12 * 64 * 64 + 500 * 64), rel=0.05)
    assert exact["mlp_density"] == pytest.approx(0.25, abs=0.15)  # few neurons
    assert exact["bytes_per_token"]["mlp_out"] < dense["bytes_per_token"]["mlp_out"] / 2
    assert eager["bytes_per_token"] == dense["bytes_per_token"]
    for result in results.values():
        assert result["p20_ms"] <= result["p50_ms"] <= result["p80_ms"]
        assert result["tok_per_s"] == pytest.approx(1e3 / result["p50_ms"])
        assert result["times_hf_eager"] == pytest.approx(eager["p50_ms"] / result["p50_ms"])
        read = sum(result["bytes_per_token"].values()) * result["tok_per_s"]
        assert result["bandwidth_share"] == pytest.approx(read / 1e9)

    console = Console(width=120)
    with console.capture() as text:
        console.print(module.table(fields))
    assert "tiny, random weights" in text.get()
    assert "HF eager" in text.get()


def test_decode_cpu_checks_first_then_writes_a_record_for_each_subject(script, model, monkeypatch, tmp_path):
    module, folder, results = script("decode_cpu"), model("opt"), tmp_path / "decode.jsonl"
    monkeypatch.setattr(module, "BUNDLED", str(folder))
    monkeypatch.setattr(module, "read_bandwidth", lambda ops: 1e9)
    flags = ("--prompt", 4, "--new", 2, "--repeat", 1, "--threads", 1, "--results", results)
    done = run(module, "--model", folder, "--shape", "tiny", *flags)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r.get("shape") or r["model"] for r in records] == [folder.name, "tiny"]
    assert records[0]["model_hash"]
    assert records[1]["weights"] == "random"
    for r in records:
        assert (r["benchmark"], r["dtype"], r["prompt"], r["new_tokens"]) == ("decode_cpu", "bf16", 4, 2)
        assert (r["backend"], r["isa"]) == ("cpu", backend("cpu").isa())

    # A model that is not quite ours: its text is not, and nothing is timed.
    def other(*args):
        theirs = load(*args)
        theirs.get_input_embeddings().weight.data += torch.randn_like(theirs.get_input_embeddings().weight)
        return theirs

    load = module.load_hugging_face
    monkeypatch.setattr(module, "load_hugging_face", other)
    done = run(module, "--model", folder, *flags)
    assert done.exit_code == 1
    assert "no times are taken" in " ".join(done.stderr.split())
    assert len(results.read_text().splitlines()) == 2

    done = run(module, "--shape", "opt-7b", *flags)
    assert done.exit_code == 1
    assert "'opt-7b' does not exist" in done.stderr


def test_greedy_equality_compares_and_fails_on_a_difference(script, model, monkeypatch, tmp_path):
    module, text, results = script("greedy_equality"), tmp_path / "text.txt", tmp_path / "greedy.jsonl"
    for name, family in zip(module.MODELS, ("opt", "llama"), strict=True):
        shutil.move(model(family), tmp_path / name)
    text.write_text("A first document.\n<|endoftext|>\nAnd a second one.\n")
    flags = ("--models-dir", tmp_path, "--text", text, "--new", 12, "--threads", 1, "--results", results)
    done = run(module, *flags, "--prompts", 2)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("2 of 2 texts of 12 tokens are the same") == 4
    for line in results.read_text().splitlines():
        assert json.loads(line)["same_tokens"] == {"dense, Hugging Face": [12, 12], "exact, dense": [12, 12]}

    eager = module.greedy
    monkeypatch.setattr(module, "greedy", lambda *args: [*eager(*args)[:-1], -1])
    done = run(module, *flags, "--prompts", 2)
    assert done.exit_code == 1
    assert done.stdout.count("0 of 2 texts") == done.stdout.count("2 of 2 texts") == 2

    done = run(module, *flags, "--prompts", 3)
    assert done.exit_code == 1
    assert "holds 2 documents, and 3 prompts were asked for" in " ".join(done.stderr.split())


def test_sparse_cpu_writes_a_record_and_figure_for_each_part(script, monkeypatch, tmp_path):
    module, results, figures = script("sparse_cpu"), tmp_path / "sparse.jsonl", tmp_path / "figures"
    monkeypatch.setattr("dejavu.bench.run.read_bandwidth", lambda ops: 1e9)
    monkeypatch.setattr(module, "read_bandwidth", lambda ops: 1e9)
    flags = ("--shape", "tiny", "--prompt", 4, "--new", 2, "--repeat", 1, "--threads", 1)
    flags += ("--results", results, "--figures", figures)
    only = [word for part in ("ours", "hf-eager", "batches", "mlp") for word in ("--only", part)]
    done = run(module, *flags, *only)
    assert done.exit_code == 0, done.output
    main, batches, mlp = (json.loads(line) for line in results.read_text().splitlines())
    sparse = main["results"]["sparse static 0.1/0.42 lazy bf16 B1 P4"]
    assert sparse["mlp_density"] == pytest.approx(0.1, abs=0.01)
    assert sparse["attn_density"] == 0.5  # 2 of 4 heads
    unions = [r["mlp_density"] for r in batches["results"].values() if r["mode"] == "sparse"]
    assert len(unions) == 5 and unions == sorted(unions)
    assert set(mlp["mlp_ms"]) == {*map(str, module.MLP_DENSITIES), "PyTorch dense"}
    assert {f.name for f in figures.iterdir()} == {
        f"tiny-{n}.{kind}" for n in ("batch", "mlp") for kind in ("png", "svg")
    }

    done = run(module, *flags, "--only", "openvin")
    assert done.exit_code == 1
    assert "did you mean openvino?" in " ".join(done.stderr.split())
