"""Text as windows of token ids, read as it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator


def windows(
    texts: Iterable[str], encode: Callable[[str], list[int]], size: int, bos: int | None
) -> Iterator[list[int]]:
    """Cut the tokens of all documents, put one after another, into windows; a rest shorter than one is left out.

    Args:
        encode: text to ids, which begin with `bos` where the model has one.
        size: tokens of a window, all of which begin with `bos`: many models need it as the first token.
    """
    waiting: list[int] = []
    for text in texts:
        waiting += encode(text)
        start = 0
        while len(waiting) - start >= size:
            # A document may begin here, and then its first token is bos already.
            lead = [] if bos is None or waiting[start] == bos else [bos]
            end = start + size - len(lead)
            yield lead + waiting[start:end]
            start = end
        del waiting[:start]
