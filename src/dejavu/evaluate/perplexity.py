"""Perplexity of text, by strided windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dejavu.engine.engine import Engine
from dejavu.engine.scoring import Request
from dejavu.errors import ConfigError
from dejavu.text import documents

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
        source: see dejavu.text.documents; here a long document stays whole.
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
    for count, document in enumerate(documents([source], whole=True)):
        if count == limit or left == 0:
            break
        ids = engine.tokenizer.encode_plain(document, special=False)
        if left is not None and len(ids) > left:
            ids = ids[:left]
            document = engine.tokenizer.decode(ids)
        left = None if left is None else left - len(ids)
        words, size = words + len(document.split()), size + len(document.encode())
        requests += windows([engine.tokenizer.prefix_id, *ids], window, stride)
    if not requests:
        raise ConfigError(f"{source}: the tokenizer makes no token of this text")
    complete = limit is None and tokens is None
    return TextTask(name, tuple(requests), ORIGINAL_WORDS.get(name, words) if complete else words, size)


def windows(ids: Sequence[int], window: int, stride: int) -> list[Request]:
    """Requests that score ids[1:] once each; every one reads `window` tokens where there are so many before it."""
    out, end = [], 1
    while end < len(ids):
        begin, end = end, min(len(ids), end + (stride if out else window))
        start = max(0, end - window - 1)
        out.append(Request(tuple(ids[start:end]), begin - start))
    return out
