"""Perplexity of text, by strided windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dejavu.engine.engine import Engine
from dejavu.engine.scoring import Request
from dejavu.engine.tokenizer import Tokenizer
from dejavu.errors import ConfigError
from dejavu.text import whole_documents

DEFINITION = (
    "exp(-sum of log p / count), count: scored tokens, words (runs of non-space characters) or UTF-8 bytes of the "
    "text. A document's tokens are scored once each, in order, in windows of {window} tokens that move on by {stride}; "
    "the first window begins with the token that begins a document."
)

# Word counts of texts whose perplexity is by convention per word of the original, which spaces punctuation out.
ORIGINAL_WORDS = {"wikitext2_test": 245_569, "wikitext2_valid": 217_646}


@dataclass(frozen=True)
class TextTask:
    """A text to score, whole documents one by one.

    Args:
        windows: see `text_task`.
        words, bytes: of all that is scored.
    """

    name: str
    windows: tuple[Request, ...]
    words: int
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(r.scored for r in self.windows)


def text_task(
    name: str,
    source: str,
    engine: Engine,
    window: int,
    stride: int,
    limit: int | None = None,
    tokens: int | None = None,
) -> TextTask:
    """Cut a text into windows.

    Args:
        source: see dejavu.text.documents; here a long document stays whole. No further is read than needed.
        window: tokens that the model reads at a time.
        stride: tokens that a window scores, all but the first window of a document; at most `window`.
        limit: documents at most.
        tokens: scored tokens at most; the document in which they end is cut there.
    Raises: ConfigError for text that is missing, empty or not text, and for a window or stride that do not fit.
    """
    context = engine.config.context
    if not 1 <= stride <= window <= context:
        raise ConfigError(
            f"expected 1 <= stride <= window <= {context}, the model's context; found stride {stride}, window {window}"
        )
    requests, words, size, left = [], 0, 0, tokens
    for parts in islice(whole_documents([source]), limit):
        document, ids = _encode(engine.tokenizer, parts, left)
        if left is not None and len(ids) > left:
            ids = ids[:left]
            document = engine.tokenizer.decode(ids)
        left = None if left is None else left - len(ids)
        words, size = words + len(document.split()), size + len(document.encode())
        requests += windows([engine.tokenizer.prefix_id, *ids], window, stride)
        if left == 0:
            break
    if not requests:
        raise ConfigError(f"{source}: the tokenizer makes no token of this text")
    complete = limit is None and tokens is None
    return TextTask(name, tuple(requests), ORIGINAL_WORDS.get(name, words) if complete else words, size)


def _encode(tokenizer: Tokenizer, parts: Iterator[str], tokens: int | None) -> tuple[str, list[int]]:
    """A document and its ids: all of it, or a beginning that has more than `tokens` ids and the right ones up to there.

    The beginning has twice as many. A word that it cuts in two has other ids than in the document, but those come last.
    """
    read: list[str] = []
    size = enough = 0
    for part in parts:
        read.append(part)
        size += len(part)
        if tokens is not None and size >= enough:
            text = "".join(read)
            ids = tokenizer.encode_plain(text, special=False)
            if len(ids) > 2 * tokens:
                return text, ids
            enough = 2 * size
    text = "".join(read)
    return text, tokenizer.encode_plain(text, special=False)


def windows(ids: Sequence[int], window: int, stride: int) -> list[Request]:
    """Requests that score ids[1:] once each; every one reads `window` tokens where there are so many before it."""
    out, end = [], 1
    while end < len(ids):
        begin, end = end, min(len(ids), end + (stride if out else window))
        start = max(0, end - window - 1)
        out.append(Request(tuple(ids[start:end]), begin - start))
    return out
