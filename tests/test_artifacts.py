"""Files are whole or absent, and reading says clearly what is wrong."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dejavu
from dejavu.artifacts import (
    atomic_write,
    locked,
    new_folder,
    read_json,
    to_json,
    write_json,
    write_tensors,
)
from dejavu.errors import CheckpointError, ConfigError


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": "x" * 1000})
    write_json(path, {"b": [1, 2.5, None, "ä"]})
    assert read_json(path) == {"b": [1, 2.5, None, "ä"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_bytes_hash_and_permissions(tmp_path):
    with atomic_write(tmp_path / "a.bin", "wb") as file:
        file.write(b"\x00\xff")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode  # the umask's, as for any file


def test_an_error_in_the_block_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"kept": True})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("half")
        _ = 1 / 0
    assert read_json(path) == {"kept": True} and os.listdir(tmp_path) == ["a.json"]


def test_nothing_appears_before_the_end(tmp_path):
    with atomic_write(tmp_path / "a") as file:
        file.write("all")
        file.flush()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "all"


def test_an_object_that_json_cannot_hold_touches_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"loss": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["missing/a.json", "file/a.json", "folder"])
def test_an_unwritable_target_is_one_clear_error(tmp_path, target):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written") as error:
        write_json(tmp_path / target, {})
    assert str(tmp_path / target) in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_json_holds_no_number_that_strict_parsers_refuse(tmp_path):
    data = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": True, "e": 3}
    plain = {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": True, "e": 3}

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(to_json(data), parse_constant=refuse) == plain
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse) == plain


def test_every_verb_prints_json_by_the_one_way():
    """A bare json.dumps lets NaN through."""
    folder = Path(dejavu.__file__).parent / "cli"
    assert [file.name for file in folder.glob("*.py") if "json.dumps" in file.read_text()] == []


def test_devices_and_links_survive(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link", {"x": 1})
    assert (tmp_path / "link").is_symlink() and read_json(tmp_path / "real.json") == {"x": 1}


def test_a_full_disk_is_an_error_of_the_target_and_other_errors_stay_their_own(tmp_path):
    with pytest.raises(ConfigError, match="No space left"), atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        open(tmp_path / "other")  # noqa: SIM115, it does not open
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"{", "parsed"), (b"\xff\xfe", "parsed"), (b"[1]", "a list"), (b"[" * 100_000, "parsed"), (None, "No such file")],
)
def test_read_json_names_the_file_and_the_fault(tmp_path, content, complaint):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as error:
        read_json(path, CheckpointError)
    assert str(path) in str(error.value)


HOLD = """
import sys, time
from dejavu.artifacts import atomic_write, locked, new_folder, read_json, write_json, write_tensors
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_one_processs_until_it_ends_even_by_a_kill(tmp_path):
    folder = tmp_path / "work"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process works there"), locked(folder):
            pass
        other.kill()
    with locked(folder) as held:
        assert held == folder


def test_a_new_folder_appears_whole_and_nothing_is_left_of_one_that_failed(tmp_path):
    with pytest.raises(ConfigError, match="No space left"), new_folder(tmp_path / "a") as folder:
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []
    with new_folder(tmp_path / "a") as folder:
        write_tensors(folder / "t.safetensors", {"x": torch.zeros(3)})
        (folder / "plain").touch()
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path) == ["a"]
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes["t.safetensors"] == modes["plain"]  # the umask's
    with pytest.raises(ConfigError, match="is there already"), new_folder(tmp_path / "a"):
        pass


def test_tensors_that_do_not_fit_are_one_line_with_the_file_and_the_reason(tmp_path):
    code = (
        "import resource, signal, sys, torch; from dejavu.artifacts import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from dejavu.errors import ConfigError\n"
        "try: write_tensors(sys.argv[1], {'x': torch.zeros(100000)})\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], capture_output=True, text=True)
    assert f"{tmp_path / 't'}: cannot be written" in done.stdout and done.stdout.count("\n") == 1, done
    assert os.listdir(tmp_path) == []
