"""Text to learn from or to be judged on: files, folders, standard input, data sets of the Hugging Face Hub."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dejavu.errors import ConfigError

# A line that holds just this ends a document; a file without one is a single document.
SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".txt.gz", ".md")
# A document longer than this comes in pieces of about this size, so that memory does not grow with the text.
PIECE_CHARS = 1 << 20


def documents(sources: Sequence[str], *, whole: bool = False) -> Iterator[str]:
    """The documents of all sources, in order, one at a time, very long ones in pieces; empty ones are left out.

    Args:
        sources: each a file (UTF-8, maybe .gz), a folder (its .txt, .txt.gz and .md files by name), "-" for standard
            input, or `hf:ID[:CONFIG][:SPLIT]`, a data set of the hub with a column "text", which needs `datasets`.
        whole: long documents stay in one piece.
    Raises: ConfigError naming a source that is missing, not text or empty; where it is read, not before.
    """
    for source in sources:
        count = 0
        for document in _one(source, None if whole else PIECE_CHARS):
            count += 1
            yield document
        if count == 0:
            raise ConfigError(f"{source}: holds no text")


def _one(source: str, piece: int | None) -> Iterator[str]:
    if source == "-":
        yield from _split(sys.stdin, "stdin", piece, first=True)
    elif source.startswith("hf:"):
        yield from _hub(source)
    elif (path := Path(source)).is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES))
        if not files:
            raise ConfigError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            with _open(file) as lines:
                yield from _split(lines, str(file), piece)
    else:
        with _open(path) as lines:
            yield from _split(lines, source, piece)


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); name a text file or folder") from error
    except EOFError as error:
        raise ConfigError(f"{path}: the compressed file is cut short") from error


def _split(lines: IO[str], name: str, piece: int | None, *, first: bool = False) -> Iterator[str]:
    """first: a byte order mark may still stand before the text."""
    document: list[str] = []
    size = 0
    try:
        while line := lines.readline(piece or -1):
            if first:
                line, first = line.removeprefix("\ufeff"), False
            ends = line.strip() == SEPARATOR
            if not ends:
                document.append(line)
                size += len(line)
            if ends or (piece is not None and size >= piece):
                if text := "".join(document).strip():
                    yield text
                document, size = [], 0
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from error
    if text := "".join(document).strip():
        yield text


def _hub(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{source}: data sets of the hub need: pip install 'dejavu[eval]'") from error
    name, *rest = source.removeprefix("hf:").split(":")
    split = rest.pop() if rest else "train"
    try:
        rows = datasets.load_dataset(name, *rest, split=split, streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise ConfigError(f'{source}: expected a column "text", found {", ".join(row)}')
            if row["text"].strip():
                yield row["text"]
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: cannot be loaded ({error})") from error
