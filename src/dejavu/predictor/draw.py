"""Windows of tokens drawn from all over a text, and dealt out: what judges shares no document with what teaches."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from math import sqrt
from random import Random

from dejavu.engine.tokenizer import Tokenizer

# Text is drawn in chunks that nearly always hold a window: English has 4 to 5 characters a token.
CHUNK_CHARS = 6
# Reading ends after this many times the text that is needed: sources may be endless.
READ = 64
# Windows drawn beyond those needed, so that documents need not be divided between purposes.
SPARE = 1 / 4

# A document's number, and ids.
Window = tuple[int, list[int]]


def draw(documents: Iterable[str], tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Window]:
    """Draw `count` windows of `length` tokens and some to spare; fewer where the text has no more.

    A chunk's chance falls with the square root of its document's length: books don't drown articles, nor articles
    books. One pass, in memory for the chunks that are kept. Windows of one document stand together, in an order of
    documents that the seed decides.
    """
    random, chunk = Random(seed), CHUNK_CHARS * length
    wanted = count + round(SPARE * count)
    # The chunks of the smallest keys, largest first: a race in which a chunk's rate is its weight. Every second one may
    # turn out too short.
    kept: list[tuple[float, int, str]] = []
    read = number = 0
    for number, document in enumerate(documents):
        starts = range(0, len(document), chunk)
        for start in starts:
            entry = (-random.expovariate(1 / sqrt(len(starts))), number, document[start : start + chunk])
            if len(kept) < 2 * wanted:
                heapq.heappush(kept, entry)
            elif entry > kept[0]:
                heapq.heapreplace(kept, entry)
        read += len(document)
        if read > READ * count * chunk:
            break
    found: list[Window] = []
    for _, source, text in sorted(kept, reverse=True):
        ids = tokenizer.encode(text)
        found += [(source, ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
        if len(found) >= wanted:
            break
    place = random.sample(range(number + 1), number + 1)
    return sorted(found[:wanted], key=lambda window: place[window[0]])


def deal(windows: Sequence[Window], sizes: Sequence[int]) -> list[list[list[int]]]:
    """The windows, in their order, for several purposes; no document serves two while there are windows to spare.

    Args:
        sizes: of each purpose; their sum is at most the number of windows.
    """
    spare, at, dealt = len(windows) - sum(sizes), 0, []
    for size in sizes:
        dealt.append([ids for _, ids in windows[at : at + size]])
        at += size
        while spare and at < len(windows) and windows[at][0] == windows[at - 1][0]:
            at, spare = at + 1, spare - 1
    return dealt
