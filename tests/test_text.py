"""Documents from every kind of source, and clear errors."""

import gzip
import io
import sys

import pytest

from dejavu.artifacts import read_json
from dejavu.errors import ConfigError
from dejavu.text import beginning, documents, whole_documents


def test_files_folders_and_separators(tmp_path):
    (tmp_path / "b.txt").write_text("one\nmore\n<|endoftext|>\n\n<|endoftext|>\ntwo\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("zéro")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert list(documents([str(tmp_path / "b.txt")])) == ["one\nmore", "two"]
    assert list(documents([str(tmp_path), str(tmp_path / "b.txt")])) == ["zéro", "one\nmore", "two", "one\nmore", "two"]


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("dejavu.text.PIECE_CHARS", 20)
    lines = ["a" * 12, "b" * 12, "c", "<|endoftext|>", "d" * 45]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert list(documents([str(tmp_path / "a.txt")])) == [
        "a" * 12 + "\n" + "b" * 12,
        "c",
        "d" * 20,
        "d" * 20,
        "d" * 5,
    ]


def test_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("text"))
    assert list(documents(["-"])) == ["text"]


def test_hub_rows(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            assert args == ("owner/name", "config") and kwargs == {"split": "test", "streaming": True}
            return [{"text": "a"}, {"text": " "}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert list(documents(["hf:owner/name:config:test"])) == ["a", "b"]


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "folder").mkdir()
    whole = gzip.compress(b"text" * 1000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    for name, message in [
        ("empty.txt", "holds no text"),
        ("bad.txt", "expected UTF-8 text, found byte 0xff"),
        ("folder", "no .txt, .txt.gz, .md file"),
        ("missing.txt", "cannot be read"),
        ("cut.txt.gz", "cut short"),
    ]:
        with pytest.raises(ConfigError, match=message) as info:
            list(documents([str(tmp_path / name)]))
        assert name in str(info.value)


def test_byte_order_marks_are_no_text(tmp_path, monkeypatch):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"hello\n<|endoftext|>\n" + b"there")
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(mark + b"again")
    assert list(documents([str(tmp_path)])) == ["hello", "there", "again"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(mark + b"piped"), encoding="utf-8"))
    assert list(documents(["-"])) == ["piped"]
    (tmp_path / "c.json").write_bytes(mark + b'{"a": 1}')
    assert read_json(tmp_path / "c.json") == {"a": 1}


def test_a_whole_document_is_read_part_by_part_and_only_as_far_as_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("dejavu.text.PIECE_CHARS", 20)
    first = " \n" + "a" * 12 + "\n" + " " * 40 + "\n" + "b" * 50 + "\n\n"
    (tmp_path / "a.txt").write_text(first + "<|endoftext|>\n \n<|endoftext|>\nc\n" + "d" * 15 + "<|endoftext|>\n")
    source = [str(tmp_path / "a.txt")]
    assert ["".join(parts) for parts in whole_documents(source)] == [first.strip(), "c\n" + "d" * 15 + "<|endoftext|>"]
    every = whole_documents(source)
    assert next(next(every)) == "a" * 12
    assert "".join(next(every)).startswith("c"), "what is left of a document is passed over"
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no text"):
        list(whole_documents(source))


def test_a_text_without_an_end_has_a_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("dejavu.text.PIECE_CHARS", 20)

    class Endless(io.StringIO):
        def readline(self, size):
            return "one two three\n<|endoftext|>\n"[:size]

    monkeypatch.setattr(sys, "stdin", Endless())
    assert beginning(["-"]).startswith("one two three\n<|endo")
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert beginning([str(tmp_path / "a.txt")]) == "one\ntwo"
