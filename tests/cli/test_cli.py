"""Every verb in process, and every bad input: one line on stderr and a non-zero exit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import dejavu
from dejavu.cli.main import app

PROMPT = "The old house"


def run(*args: str, **settings) -> Result:
    return CliRunner().invoke(app, list(args), **settings)


def text(*args: str, **settings) -> str:
    result = run(*args, **settings)
    assert result.exit_code == 0, result.output
    return result.stdout


def error(*args: str, **settings) -> str:
    """The message of a run that must fail cleanly."""
    result = run(*args, **settings)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def expected() -> dejavu.Generation:
    return dejavu.load().generate(PROMPT, max_new_tokens=8)


def test_generate_takes_the_prompt_from_anywhere(expected, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    for args, stdin in (
        ((PROMPT,), ""),
        (("opt-mini", PROMPT), ""),
        (("opt-mini", "-"), PROMPT),
        (("-",), PROMPT + "\n"),
        ((), PROMPT),
        (("--prompt-file", str(file)), ""),
        (("opt-mini", "--prompt-file", str(file)), ""),
    ):
        assert text("generate", *args, "-n", "8", input=stdin) == expected.text + "\n"


def test_a_sole_word_that_names_a_model_is_the_model_where_a_prompt_is_piped(expected):
    bundled = Path(dejavu.__file__).parent / "assets" / "opt-mini"
    for word in ("opt-mini", str(bundled)):
        assert text("generate", word, "-n", "8", input=PROMPT + "\n") == expected.text + "\n"
    # On the hub, which is not there: but it was looked for.
    assert "'nobody/no-model': there is no such folder" in error("generate", "nobody/no-model", input=PROMPT)
    result = run("generate", str(bundled), input="")
    assert result.exit_code == 2 and "is a model's folder: give a PROMPT" in " ".join(
        result.stderr.replace("│", "").split()
    )
    for prompt in ("opt-mini", "and/or", "~", "~nobody", "/"):
        assert text("generate", prompt, "-n", "1", input="")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mlp-density 0.5", "--mlp-density goes with --policy, which is not given"),
        ("--pack opt-mini --attn-density 0.5", "--attn-density goes with --policy"),
        ("--kv lazy --mode exact", "--kv goes with --policy"),
        ("--calibration no-such-file", "--calibration goes with --policy"),
        ("--policy oracle --calibration no-such-file", "--calibration goes with --policy static, found oracle"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(flags, message, monkeypatch):
    for module in ("generate", "evaluate"):
        monkeypatch.setattr(f"dejavu.cli.{module}.load_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    assert message in error("generate", "hi", *flags.split())
    if "exact" not in flags:
        assert message in error("eval", "--text", "no-such-file", *flags.split())


def test_generate_json(expected):
    record = json.loads(text("generate", PROMPT, "-n", "8", "--json", "--logprobs", "2"))
    assert record["text"] == expected.text and tuple(record["token_ids"]) == expected.token_ids
    assert (record["model"], record["mode"], record["dtype"]) == ("opt-mini", "exact", "bfloat16")
    assert [len(entry["top"]) for entry in record["logprobs"]] == [2] * 8
    assert record["stats"]["new_tokens"] == 8


def test_generate_settings_reach_the_engine():
    flags = "--temperature 0.9 --top-k 50 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --seed 3 --mode dense"
    record = json.loads(text("generate", PROMPT, "-n", "8", "--dtype", "fp32", "--json", *flags.split()))
    direct = dejavu.load(dtype="fp32", mode="dense").generate(
        PROMPT, max_new_tokens=8, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3
    )
    assert record["text"] == direct.text
    assert (record["mode"], record["dtype"]) == ("dense", "float32")


def test_generate_stops(expected):
    stop = expected.text[8:12]
    assert text("generate", PROMPT, "-n", "8", "--stop", stop, "--stop", "\t") == expected.text[:8] + "\n"


def test_generate_stats_go_to_stderr(expected):
    result = run("generate", PROMPT, "-n", "8", "--stats")
    assert result.stdout == expected.text + "\n"
    for word in ("MLP density", "read per token: attention", "tokens per second"):
        assert word in result.stderr


def test_generate_writes_a_file(expected, tmp_path):
    out = tmp_path / "out.txt"
    assert text("generate", PROMPT, "-n", "8", "-o", str(out)) == ""
    assert out.read_text() == expected.text + "\n"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("place", ["missing/out.txt", "."])
def test_an_output_that_cannot_be_written_is_found_first(place, tmp_path, monkeypatch):
    monkeypatch.setattr("dejavu.cli.generate.load_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    assert str(tmp_path / place) in error("generate", PROMPT, "-o", str(tmp_path / place))


@pytest.mark.parametrize(
    "args, message",
    [
        (["a" * 20_000 + " b" * 10_000], "more than the model's context of 1024"),
        (["--prompt-file", "no-such-file"], "no-such-file: cannot be read"),
        (["hi", "--temperature", "-1"], "temperature must be a number of at least 0, found -1.0"),
        (["hi", "-n", "0"], "max_new_tokens must be a positive integer, found 0"),
        (["hi", "--top-k", "5"], "need a temperature above 0"),
        (["hi", "--mode", "fast"], "mode 'fast' does not exist; choose one of: auto, dense, exact"),
        (["hi", "--dtype", "int3"], "dtype 'int3' is not supported"),
        (["hi", "--backend", "cuda"], "backend 'cuda' does not exist"),
        (["hi", "--threads", "0"], "threads must be an integer from 1 to"),
        (["hi", "--revision", "main"], "applies to hub ids only"),
    ],
)
def test_generate_refuses(args, message):
    assert message in error("generate", *args)


def test_generate_refuses_a_damaged_model(make_checkpoint):
    folder = make_checkpoint()
    (folder / "config.json").write_text("{")
    assert "config.json: expected JSON" in error("generate", str(folder), "hi")
    assert "config.json: expected JSON" in error("info", str(folder))


def test_a_prompt_longer_than_any_is_not_read_to_its_end(tmp_path, monkeypatch):
    file = tmp_path / "long.txt"
    with file.open("wb") as out:
        out.truncate(1 << 30)
    monkeypatch.setattr("dejavu.cli.generate.load_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    assert "long.txt: more than 64 MiB, longer than any context" in error("generate", "--prompt-file", str(file))


def test_generate_refuses_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("café".encode("latin-1"))
    message = error("generate", "--prompt-file", str(file))
    assert "latin1.txt: expected UTF-8 text, found byte 0xe9 at offset 3" in message


@pytest.mark.parametrize("args", [["hi", "--logprobs", "1"], ["a", "b", "--prompt-file", "f"], ["--no-such-flag"]])
def test_wrong_usage_exits_with_2(args):
    result = run("generate", *args)
    assert (result.exit_code, result.stdout) == (2, "") and "Usage" in result.stderr


def test_info():
    record = json.loads(text("info", "--json"))
    assert (record["family"], record["parameters"], record["dtype"]) == ("opt", 34_134_016, "bfloat16")
    assert {"dense", "exact"} <= set(record["modes"])
    # 8 layers of 512 x 2048 in bf16, and the bias
    assert record["dense_step_bytes"]["mlp_out"] == 8 * (512 * 2048 * 2 + 512 * 4)
    shown = text("info", "opt-mini", "--dtype", "fp32")
    assert "34,134,016" in shown and "float32" in shown and "read per token: kv" in shown


def test_info_says_what_is_stored_and_what_it_is_computed_in(make_checkpoint):
    record = json.loads(text("info", str(make_checkpoint("opt", dtype=torch.float16)), "--json"))
    assert (record["stored"], record["dtype"]) == ("float16", "bfloat16")


def test_info_says_whether_a_packs_hash_was_compared(tmp_path):
    folder = Path(shutil.copytree(Path(dejavu.__file__).parent / "assets/opt-mini-pack", tmp_path / "pack"))
    assert "verified: manifest and tensors are what was written (sha256)" in text("info", str(folder))
    assert json.loads(text("info", str(folder), "--json"))["verified"] is True

    # An older pack, without a hash, and with the figures alone that every pack has.
    manifest = json.loads((folder / "pack.json").read_text())
    del manifest["sha256"]
    for point in manifest["points"]:
        for name in ("mlp_recall", "mlp_precision"):
            del point["measured"][name]
    (folder / "pack.json").write_text(json.dumps(manifest | {"schema": 2}))
    shown = text("info", str(folder))
    assert "not verified: a pack of this age holds no hash" in shown and "-" in shown
    assert json.loads(text("info", str(folder), "--json"))["verified"] is False


def test_info_never_reads_the_weights(make_checkpoint, monkeypatch):
    monkeypatch.setattr("dejavu.checkpoint.source.Checkpoint.tensors", lambda *_: pytest.fail("weights were read"))
    folder = make_checkpoint("llama", hidden_act="silu")
    record = json.loads(text("info", str(folder), "--json"))
    assert "dense" in record["modes"] and "exact" not in record["modes"]
    assert record["gated"] is True


def test_demo():
    shown = text("demo", "-n", "6")
    assert shown.count("dense and exact wrote the same 6 tokens") == 3
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["dense", "exact", "sparse"]
    megabytes, density, heads = ([float(row[i].rstrip("MB %")) for row in rows] for i in (3, 4, 5))
    assert megabytes[0] > megabytes[1] > megabytes[2]
    assert density[0] == 100 and max(density[1:]) < 20
    # exact skips neurons only
    assert heads[:2] == [100, 100] and heads[2] < 100


def test_the_command_itself():
    assert text("--version") == f"dejavu {dejavu.__version__}\n"
    assert all(verb in text("--help") for verb in ("generate", "info", "demo"))
    for verb in ("generate", "info", "demo"):
        assert f"Example: dejavu {verb}" in text(verb, "--help")
    result = run("--debug", "generate", "hi", "-n", "0")
    assert isinstance(result.exception, dejavu.DejavuError)


def test_of_a_long_calibration_text_no_more_is_read_than_the_policy_looks_at(tmp_path, monkeypatch):
    file = tmp_path / "long.txt"
    file.write_text("The café by the river. " * 2000, encoding="utf-8")
    args = ("generate", PROMPT, "-n", "8", "--policy", "static", "--mlp-density", "0.2", "--calibration", str(file))
    whole = text(*args)
    for most in range(40_014, 40_019):  # one of them between the two bytes of an é
        monkeypatch.setattr("dejavu.cli.generate.CALIBRATION_BYTES", most)
        assert text(*args) == whole
