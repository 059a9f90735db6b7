"""What only a real process shows: pipes, signals and files that refuse."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

GENERATE = [sys.executable, "-m", "dejavu", "generate"]


def test_stdin_that_is_not_utf8():
    result = subprocess.run([*GENERATE, "-"], input=b"abc\xff", capture_output=True)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"error: stdin: expected UTF-8 text, found byte 0xff at offset 3; convert it\n"


def test_ctrl_c_keeps_what_was_written(tmp_path):
    long = [*GENERATE, "The old house", "-n", "1000", "--ignore-eos"]

    def heed() -> None:
        """A suite that a shell started in the background ignores the signal, and its children would too."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    first = os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert first.strip() and (first + rest).endswith(b"\n")
    assert (process.returncode, errors) == (130, b"")


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [*GENERATE, "The old house", "-n", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*GENERATE, "The", "-n", "2"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_sigterm_leaves_no_file_behind(tmp_path):
    out = tmp_path / "out.txt"
    process = subprocess.Popen([*GENERATE, "The old house", "-n", "1000", "--ignore-eos", "-o", str(out)])
    deadline = monotonic() + 120
    while not list(tmp_path.iterdir()):  # the file to be comes first of all
        assert process.poll() is None and monotonic() < deadline
        sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [">&-", "| true", "2>&- >&-"])
def test_a_closed_stdout_is_no_traceback(closed):
    run = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m dejavu info {closed}"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert b"Traceback" not in run.stderr


def test_no_encoding_of_stdout_loses_a_character_of_json():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    prompt = "caf\u00e9 \U0001f336"
    run = subprocess.run([*GENERATE, prompt, "-n", "4", "--json"], capture_output=True, env=environment)
    assert run.returncode == 0 and json.loads(run.stdout)["prompt"] == prompt
    plain = subprocess.run([*GENERATE, prompt, "-n", "4"], capture_output=True, env=environment)
    assert (plain.returncode, plain.stderr) == (0, b"")


def test_of_two_fits_into_one_folder_one_is_refused_at_once(tmp_path):
    """And the other ends as it would alone: no mixture of two packs."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The {n} old houses on hill {n * 7} fell in the year {n * 13}." for n in range(4000)))
    out = tmp_path / "pack"
    command = [sys.executable, "-m", "dejavu", "fit", "opt-mini", "--text", str(text), "-o", str(out), "--no-train"]
    command += ["--window", "32", "--tokens", "1024", "--calibration-tokens", "256", "--max-kl", "9", "--rank", "16"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = monotonic() + 240
    while not (tmp_path / "pack.work" / "settings.json").exists():
        assert first.poll() is None and monotonic() < deadline, first.communicate()
        sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "pack.work: another process works there" in second.stderr
    assert first.wait(300) == 0, first.stderr.read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pack", "text.txt"]
    mode = {file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert len(mode) == 1, "the umask decides, for every file"
