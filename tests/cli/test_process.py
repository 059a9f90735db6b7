"""What only a real process shows: pipes, signals and files that refuse."""

import os
import signal
import subprocess
import sys
from pathlib import Path

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
