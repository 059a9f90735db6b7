"""A record is one line of JSON that says what was measured, when, where and on which code."""

import json
import subprocess

import pytest

from dejavu.bench import record


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit, which record takes for its own."""

    def git(*args):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "code.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(record, "__file__", str(tmp_path / "code.py"))
    return tmp_path


def test_records_are_appended_as_lines(tmp_path):
    path = tmp_path / "results" / "bench.jsonl"
    returned = [record.append(path, shape="opt-1.3b", results={"ms": float(n)}) for n in range(2)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == returned
    assert [line["results"] for line in lines] == [{"ms": 0.0}, {"ms": 1.0}]
    for key in ("time", "commit", "dirty", "hardware", "versions", "shape"):
        assert key in lines[0]
    assert {"python", "torch"} <= lines[0]["versions"].keys()


def test_a_record_that_is_not_json_is_not_written(tmp_path):
    with pytest.raises(TypeError):
        record.append(tmp_path / "bench.jsonl", ms=object())
    assert not (tmp_path / "bench.jsonl").exists()
    record.append(tmp_path / "bench.jsonl", ms=float("nan"))  # for which JSON has no word
    assert '"ms": null' in (tmp_path / "bench.jsonl").read_text()


def test_changed_code_is_dirty_and_earlier_records_are_not(repository):
    path = repository / "benchmarks" / "results" / "bench.jsonl"
    first, second = record.append(path), record.append(path)
    assert len(first["commit"]) == 40
    assert (first["dirty"], second["dirty"]) == (False, False)
    (repository / "code.py").write_text("changed")
    assert record.append(path)["dirty"] is True


def test_outside_of_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    written = record.append(tmp_path / "bench.jsonl")
    assert (written["commit"], written["dirty"]) == (None, None)
