"""Where verbs write: what cannot be written, or is another process's, is refused before any work, in one line."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dejavu.artifacts import locked
from dejavu.cli.main import app
from dejavu.errors import ConfigError

# Verbs that write into a folder, and what they write there.
INTO = {
    ("profile", "--text", "no.txt", "-o"): ("state.npz", "profile.json", "profile.html", "norms.svg"),
    ("eval", "--text", "no.txt", "-o"): ("scores.jsonl", "results.json"),
    ("compare", "dense", "exact", "--text", "no.txt", "-o"): ("scores.jsonl", "results.json", "compare.png"),
    ("bench", "--peers", "none", "-o"): ("bench.jsonl", "bench.partial.json", "times.png"),
}
# Verbs that make a folder, and where they work until it is whole.
MAKE = {
    ("fit", "opt-mini", "--text", "no.txt", "-o"): "{}.work",
    ("tune", "opt-mini", "--max-ppl-increase", "20%", "-o"): ".{}.tmp",
    ("quantize", "opt-mini"): ".{}.tmp",
}


@pytest.fixture
def idle(monkeypatch):
    """No weights are read, and nothing is measured."""

    def work(*_, **__):
        pytest.fail("work began")

    for place in ("evaluate", "fit", "profile"):
        monkeypatch.setattr(f"dejavu.cli.{place}.load_engine", work)
    monkeypatch.setattr("dejavu.families.load.load_weights", work)
    monkeypatch.setattr("dejavu.bench.run.measure", work)


def refused(*args: str | Path) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in INTO.items() for name in names])
def test_a_folder_where_a_file_is_to_be_written_is_found_first(verb, name, tmp_path, idle):
    (tmp_path / "out" / name).mkdir(parents=True)
    assert f"{name}: is not a file, and one is to be written there" in refused(*verb, tmp_path / "out")


@pytest.mark.parametrize("verb", INTO)
def test_a_file_where_a_folder_is_to_be_is_found_first(verb, tmp_path, idle):
    (tmp_path / "results.json").touch()
    assert "results.json: is not a folder" in refused(*verb, tmp_path / "results.json")


@pytest.mark.parametrize("verb", MAKE)
@pytest.mark.parametrize("kind", ["touch", "mkdir"])
def test_what_is_there_is_never_overwritten(verb, kind, tmp_path, idle):
    getattr(tmp_path / "out", kind)()
    assert "out: is there already" in refused(*verb, tmp_path / "out")


def test_a_file_in_place_of_the_work_folder_is_found_first(tmp_path, idle):
    (tmp_path / "out.work").touch()
    assert "out.work: is not a folder" in refused("fit", "opt-mini", "--text", "no.txt", "-o", tmp_path / "out")


@pytest.mark.parametrize("verb", INTO)
def test_a_folder_that_another_process_works_in_is_refused_at_once(verb, tmp_path, idle):
    out = tmp_path / "out"
    with locked(out):
        (out / "bench.partial.json").write_text("another's")
        assert "out: another process works there" in refused(*verb, out)
        assert [file.name for file in out.iterdir()] == ["bench.partial.json"]
        assert (out / "bench.partial.json").read_text() == "another's"


@pytest.mark.parametrize("verb", MAKE)
def test_a_folder_that_another_process_makes_is_refused_at_once(verb, tmp_path, idle):
    work = tmp_path / MAKE[verb].format("out")
    with locked(work):
        assert "another process works there" in refused(*verb, tmp_path / "out")
        assert list(work.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_errors_name_what_was_asked_for_and_not_a_folder_of_ours(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert refused("tune", "opt-mini", "--max-ppl-increase", "20%", "-o", out).startswith(f"error: {out}: cannot be")
    with pytest.raises(ConfigError, match="asked for: cannot be written"), locked(out, shown=Path("asked for")):
        pass


def run_on_a_small_disk(limit: int, *args: str | Path) -> str:
    """The one line with which a verb ends that may write no file of more than `limit` bytes."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-B", "-m", "dejavu", *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=small, timeout=300)
    assert run.returncode == 1 and run.stdout == "", run
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_quantize_on_a_full_disk_leaves_nothing(make_checkpoint, tmp_path):
    out = tmp_path / "out"
    assert "File too large" in run_on_a_small_disk(8192, "quantize", make_checkpoint(), out)
    assert list(tmp_path.iterdir()) == []


def test_tune_on_a_full_disk_leaves_nothing(tmp_path):
    assert "File too large" in run_on_a_small_disk(
        65536, "tune", "opt-mini", "--max-ppl-increase", "20%", "-o", tmp_path / "out"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs to mount, so root and unshare")
@pytest.mark.parametrize("args", [["demo", "-n", "2"], ["generate", "The", "-n", "2", "--pack", "opt-mini"], ["info"]])
def test_what_only_reads_needs_no_place_to_write_but_a_temporary_one(args, tmp_path):
    """A system that is read-only but for one folder, and no home: hashes cannot be remembered, nor bytecode kept."""
    script = """
    mount -t tmpfs none "$TMPDIR" && mount -o remount,ro,bind / && ! touch here 2> /dev/null || exit 77
    exec "$@"
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("DEJAVU_CACHE", "XDG_CACHE_HOME")}
    python = [sys.executable, "-m", "dejavu"]
    run = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "-", *python, *args],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment | {"HOME": "/nonexistent", "TMPDIR": str(tmp_path)},
    )
    if run.returncode == 77 or "unshare failed" in run.stderr:
        pytest.skip("this system does not let us mount")
    assert (run.returncode, run.stderr) == (0, "") and run.stdout
