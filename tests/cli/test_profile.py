"""`dejavu profile` in process, on the bundled model."""

import json

import pytest
from typer.testing import CliRunner

from dejavu.cli.main import app

TEXT = "The river rises in the hills to the north of the town and flows south for about forty miles. " * 12
SHORT = ["--tokens", "96", "--window", "48", "--quality-tokens", "48", "--density", "0.1", "--threads", "1"]


def run(*args: str, **settings):
    return CliRunner().invoke(app, ["profile", *args], **settings)


def test_table_json_and_a_second_call(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    out = str(tmp_path / "out")
    args = ["--text", str(tmp_path / "a.txt"), "-o", out, *SHORT]
    shown = run(*args)
    assert shown.exit_code == 0, shown.output
    assert "Densities of opt-mini" in shown.stdout and "profile.html" in shown.stdout
    again = run(*args, "--json")
    result = json.loads(again.stdout)
    assert result == json.loads((tmp_path / "out" / "profile.json").read_text())
    assert result["layers"] == 8 and max(result["firing"]["density"][1:]) < 0.2 and len(result["checkpoint_hash"]) == 64
    oracle, rand = (result["quality"]["mlp"][policy][0][1] for policy in ("oracle", "random"))
    assert oracle < rand


def test_text_from_stdin(tmp_path):
    args = ["--text", "-", "-o", str(tmp_path / "out"), *SHORT, "--quality-tokens", "0", "--json"]
    result = run(*args, input=TEXT)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quality"] is None


@pytest.mark.parametrize(
    "args, message",
    [
        (["--text", "missing.txt"], "missing.txt: cannot be read"),
        (["--text", "missing.txt", "--tokens", "10"], "tokens must be an integer of at least one window"),
        (["--text", "missing.txt", "--error", "2"], "errors must be numbers between 0 and 1"),
        (["--text", "missing.txt", "--window", "4096", "--tokens", "8192", "--quality-tokens", "0"], "at most 1024"),
    ],
)
def test_bad_input(args, message, tmp_path):
    result = run(*args, "-o", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (1, "") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_text_is_wrong_usage():
    assert run().exit_code == 2


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dejavu.profile.quality.measure", interrupt)
    result = run("--text", str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), *SHORT)
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
    assert not list((tmp_path / "out").glob(".*.tmp"))
