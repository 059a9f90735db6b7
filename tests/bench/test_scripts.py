"""The benchmark scripts on tiny models, and what they refuse to do."""

import gzip
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from dejavu.bench import shapes
from dejavu.checkpoint.source import BUNDLED
from dejavu.evaluate import run as evaluation

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


def test_greedy_equality_compares_and_fails_on_a_difference(script, model, monkeypatch, tmp_path):
    module, text, results = script("greedy_equality"), tmp_path / "text.txt", tmp_path / "greedy.jsonl"
    bundled, name = module.MODELS  # no folder holds the first
    assert bundled == BUNDLED
    shutil.move(model("llama"), tmp_path / name)
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
    sparse = main["results"]["sparse random predictor 0.1/0.42 lazy bf16 B1 P4"]
    assert sparse["bytes_per_token"]["predictor"] > 0
    always = [r for r in batches["results"].values() if r["crossover"] is False]
    assert [r["batch"] for r in always] == [1, 2, 4, 8, 16]
    assert always[0]["attn_density"] == 0.5  # 2 of 4 heads
    read = [r["bytes_per_token"]["mlp_in"] for r in always]
    assert read == sorted(read)
    assert len(batches["results"]) == 15
    assert set(mlp["mlp_ms"]) == {*map(str, module.MLP_DENSITIES), "PyTorch dense"}
    assert {f.name for f in figures.iterdir()} == {
        f"tiny-{n}.{kind}" for n in ("batch", "mlp") for kind in ("png", "svg")
    }

    done = run(module, *flags, "--only", "openvin")
    assert done.exit_code == 1
    assert "did you mean openvino?" in " ".join(done.stderr.split())


def test_ablations_write_one_record_and_one_figure(script, model, monkeypatch, tmp_path):
    module, text, results = script("ablations"), tmp_path / "text.txt", tmp_path / "ablations.jsonl"
    for name, value in (("WINDOW", 32), ("RANKS", (1 / 4,)), ("SHARES", (0.98,))):
        monkeypatch.setattr(module, name, value)
    text.write_text(
        "\n<|endoftext|>\n".join(f"Document {i} says {' '.join(map(str, range(i, i + 90)))}." for i in range(40))
    )
    flags = ("--text", text, "--tokens", 2048, "--judged", 512, "--epochs", 1, "--threads", 1, "--results", results)
    done = run(module, model("opt"), *flags, "--figure", tmp_path / "figure.png")
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())["results"]
    assert set(found) == {"ranks", "formats", "lookahead", "methods", "heads"}
    assert all(f["kl"] >= 0 for part in found.values() for f in part.values())
    assert (tmp_path / "figure.png").stat().st_size > 0
    done = run(module, model("opt"), *flags, "--tokens", 1 << 20)
    assert done.exit_code == 1 and "the text is too short" in done.stderr


@pytest.fixture
def corpus(tmp_path):
    """A folder of texts and task files as quality.py wants it."""
    prose = "The old mill stood by the river for two hundred years, until the railway came to the valley."
    for name in ("text", "eval"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "wiki_heldout.txt").write_text(prose)
    (tmp_path / "eval" / "wikitext2_test.detok.txt").write_text(prose)
    with gzip.open(tmp_path / "text" / "calibration.txt.gz", "wt") as file:
        file.write(prose)
    pairs = [{"sentence_good": "The house is old.", "sentence_bad": "The house are old."},
             {"sentence_good": "The dogs slept.", "sentence_bad": "The dogs sleeps."}]  # fmt: skip
    (tmp_path / "eval" / "blimp.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def test_quality_goes_from_scores_to_the_page(script, model, corpus, monkeypatch, tmp_path):
    module, tiny = script("quality"), tmp_path / "tiny"
    shutil.move(model("opt"), tiny)
    monkeypatch.setattr(module, "DENSITIES", (0.5, 0.25))
    monkeypatch.setattr(module, "STEPPED", ("both oracle 0.25",))
    monkeypatch.setattr(module, "DOCUMENTS", {"blimp": 2})
    monkeypatch.setattr(evaluation, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(evaluation, "TIMED_TOKENS", 2)
    flags = [str(x) for x in ("--data", corpus, "--work", tmp_path / "work", "--results", tmp_path, "--tokens", 24)]
    calls = (["selection", str(tiny), *flags, "--window", "16"], ["packs", "opt-mini", "opt-mini", *flags])
    for call in calls:
        done = CliRunner().invoke(module.app, call, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "quality_selection.jsonl").read_text())
    assert len(record["points"]) == 1 + 3 * 4 * 2
    both = record["by_path"]
    for name, point in both["steps"].items():
        assert point["perplexity"]["value"] == pytest.approx(both["masked"][name]["perplexity"]["value"], rel=1e-3)

    page = tmp_path / "evaluate.md"
    marks = ("selection tiny", "path tiny", "packs opt-mini")
    page.write_text("Before.\n" + "".join(f"<!-- {mark} -->\nold\n<!-- end -->\n" for mark in marks) + "After.\n")
    (tmp_path / "figures").mkdir()
    module.quality_docs.write(tmp_path, tmp_path)
    text = page.read_text()
    assert "old" not in text.replace("hold", "") and text.startswith("Before.") and text.endswith("After.\n")
    assert text.count("| both | oracle |") == 1 and "| blimp (acc, 2) |" in text and "| both oracle 0.25 |" in text
    assert len(list((tmp_path / "figures").iterdir())) == 2
