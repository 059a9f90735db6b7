"""Text to learn from or to be judged on: files, folders, standard input, data sets of the Hugging Face Hub."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import IO

from dejavu.errors import ConfigError

# A line that holds just this ends a document; a file without one is a single document.
SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".txt.gz", ".md")
# A document longer than this comes in pieces of about this size, so that memory does not grow with the text.
PIECE_CHARS = 1 << 20


def documents(sources: Sequence[str]) -> Iterator[str]:
    """The documents of all sources, in order, one at a time, very long ones in pieces; empty ones are left out.

    Args:
        sources: each a file (UTF-8, maybe .gz), a folder (its .txt, .txt.gz and .md files by name), "-" for standard
            input, or `hf:ID[:CONFIG][:SPLIT]`, a data set of the hub with a column "text", which needs `datasets`.
    Raises: ConfigError naming a source that is missing, not text or empty; where it is read, not before.
    """
    for source in sources:
        found = False
        for piece, _ in _pieces(source):
            if text := piece.strip():
                found = True
                yield text
        if not found:
            raise ConfigError(f"{source}: holds no text")


def whole_documents(sources: Sequence[str]) -> Iterator[Iterator[str]]:
    """The same documents, each as an iterator of parts, which make up all of it when they are put together.

    A part is read when it is asked for, and asking for the next document passes over what is left of this one: how much
    is in memory is up to the caller.
    """
    for source in sources:
        found = False
        for _, document in groupby(_numbered(source), key=itemgetter(0)):
            parts = _stripped(piece for _, piece in document)
            if first := next(parts, None):
                found = True
                yield chain([first], parts)
        if not found:
            raise ConfigError(f"{source}: holds no text")


def beginning(sources: Sequence[str]) -> str:
    """The first documents, with line ends between them: as many as make PIECE_CHARS characters; no more is read."""
    kept, size = [], 0
    for document in documents(sources):
        kept.append(document)
        size += len(document)
        if size >= PIECE_CHARS:
            break
    return "\n".join(kept)


def _numbered(source: str) -> Iterator[tuple[int, str]]:
    """Pieces of a source, each with the number of its document."""
    number = 0
    for piece, ends in _pieces(source):
        yield number, piece
        number += ends


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """A document's pieces without white space at the very beginning and end; nothing where there is nothing else."""
    begun, held = False, ""
    for piece in pieces:
        piece = held + piece if begun else piece.lstrip()
        text = piece.rstrip()
        held = piece[len(text) :]  # it belongs to the document if anything follows
        if text:
            begun = True
            yield text


def _pieces(source: str) -> Iterator[tuple[str, bool]]:
    """The text as it stands there, in pieces of one document each, and whether that document ends with it."""
    if source == "-":
        yield from _split(sys.stdin, "stdin", first=True)
    elif source.startswith("hf:"):
        yield from ((text, True) for text in _hub(source))
    elif (path := Path(source)).is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES))
        if not files:
            raise ConfigError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            with _open(file) as lines:
                yield from _split(lines, str(file))
    else:
        with _open(path) as lines:
            yield from _split(lines, source)


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); name a text file or folder") from error
    except EOFError as error:
        raise ConfigError(f"{path}: the compressed file is cut short") from error


def _split(lines: IO[str], name: str, *, first: bool = False) -> Iterator[tuple[str, bool]]:
    """first: a byte order mark may still stand before the text."""
    piece: list[str] = []
    size, line_begins = 0, True
    try:
        while line := lines.readline(PIECE_CHARS):
            if first:
                line, first = line.removeprefix("\ufeff"), False
            ends = line_begins and line.strip() == SEPARATOR
            line_begins = line.endswith("\n")
            if not ends:
                piece.append(line)
                size += len(line)
            if ends or size >= PIECE_CHARS:
                yield "".join(piece), ends
                piece, size = [], 0
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from error
    yield "".join(piece), True


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
