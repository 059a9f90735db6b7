"""`dejavu bench` in process: a record, figures, a table; every bad input in one line."""

import json

import pytest
from typer.testing import CliRunner

from dejavu.bench import run as bench
from dejavu.bench import shapes
from dejavu.cli.main import app

TINY = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 64}  # fmt: skip
SHORT = ("--new-tokens", "2", "--repeat", "1", "--threads", "1", "--prompt", "4")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["opt-125m"] | TINY)
    monkeypatch.setattr(bench, "read_bandwidth", lambda ops: 1e9)


def run(*args):
    return CliRunner().invoke(app, ["bench", *args])


def test_a_shape_with_a_peer_writes_figures_and_a_record(tmp_path):
    folder = tmp_path / "out"
    args = ("--shape", "tiny", *SHORT, "--mode", "dense", "--mode", "sparse", "--mlp-density", "0.1")
    args += ("--mlp-density", "0.5", "--attn-density", "0.5", "--kv", "lazy", "--peers", "hf-eager", "-o", str(folder))
    for count in (1, 2):
        done = run(*args, "--json")
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        assert [json.loads(line)["shape"] for line in (folder / "bench.jsonl").read_text().splitlines()] == [
            "tiny"
        ] * count
    assert record["weights"] == "random"
    assert [r.get("mode", r.get("peer")) for r in record["results"].values()] == [
        "dense",
        "sparse",
        "sparse",
        "hf-eager",
    ]
    assert {p.name for p in folder.iterdir()} == {
        "bench.jsonl", "times.png", "times.svg", "density.png", "density.svg"
    }  # fmt: skip


def test_a_model_shows_a_table_and_its_overhead():
    done = run(*SHORT, "--peers", "none")
    assert done.exit_code == 0, done.output
    assert "dense bf16 B1 P4" in done.stdout
    assert "exact bf16 B1 P4" in done.stdout
    assert "outside of the kernels" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shape", "opt-7b"), "did you mean opt-6.7b?"),
        (("--peers", "openvin"), "did you mean openvino?"),
        (("--peers", "none", "--peers", "hf-eager"), "none goes with no other peer"),
        (("--peers", "hf-eager", "--peer-weights", "int4"), "offers weights bf16, fp32 here"),
        (("--mode", "sparse", "--mlp-density", "0"), "mlp_density must be in (0, 1], found 0"),
        (("--mode", "sparse", "--attn-density", "1.5"), "attn_density must be in (0, 1], found 1.5"),
        (("--mode", "sparce"), "mode 'sparce' does not exist; choose one of: auto, dense, exact, sparse"),
        (("--shape", "tiny", "--prompt", "64"), "more than the model's context of 64"),
        (("--weights", "int3"), "weights 'int3' are not supported"),
        (("--policy", "static", "--mode", "sparse"), "policy static needs a text"),
        (("--threads", "0"), "threads must be an integer from 1 to"),
    ],
)
def test_bad_input_is_one_line(args, message):
    done = run("--peers", "none", *args) if "--peers" not in args else run(*args)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_ctrl_c_writes_no_record(monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "decode_times", stop)
    done = run(*SHORT, "--peers", "none", "-o", str(tmp_path / "out"))
    assert done.exit_code != 0
    assert (tmp_path / "out" / "bench.jsonl").read_text() == ""


def test_rounds_are_kept_as_they_are_made(monkeypatch, tmp_path):
    """What ends the whole process, a kill say, leaves the rounds before it."""
    rounds, real = [], bench.decode_times

    def decode_times(*args):
        rounds.append(1)
        if len(rounds) == 4:  # one is warm-up
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bench, "decode_times", decode_times)
    args = ("--new-tokens", "2", "--repeat", "9", "--threads", "1", "--prompt", "4", "--mode", "dense")
    assert run("--shape", "tiny", *args, "--peers", "none", "-o", str(tmp_path)).exit_code != 0
    kept = json.loads((tmp_path / "bench.partial.json").read_text())
    assert kept["repeat"] == 2 and kept["results"]["dense bf16 B1 P4"]["p50_ms"] > 0
    monkeypatch.setattr(bench, "decode_times", real)
    assert run("--shape", "tiny", *SHORT, "--peers", "none", "-o", str(tmp_path)).exit_code == 0
    assert not (tmp_path / "bench.partial.json").exists()


@pytest.mark.parametrize("args", [("--weights", "int8"), ("--backend", "reference"), ("--new-tokens", "1")], ids=str)
def test_the_overhead_does_not_end_a_run_that_was_measured(args):
    done = run(*SHORT, "--peers", "none", "--mode", "dense", *args, "--json")
    assert done.exit_code == 0, done.output
    assert ("overhead_share" in json.loads(done.stdout)) == ("reference" not in args)


def test_a_folder_that_cannot_hold_the_record_is_refused_first(monkeypatch, tmp_path):
    (tmp_path / "bench.jsonl").mkdir()
    monkeypatch.setattr(bench, "decode_times", lambda *args: pytest.fail("measured"))
    done = run(*SHORT, "--peers", "none", "-o", str(tmp_path))
    assert (done.exit_code, done.stdout) == (1, "") and "bench.jsonl: is not a file" in done.stderr
