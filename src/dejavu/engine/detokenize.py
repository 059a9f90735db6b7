"""Tokens to text while they come: never half a character, never what may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens of the prompt that are decoded before the first new one: decoders treat the start of a text apart
# (SentencePiece drops its first space), and the new text does not start there. Enough for a whole character between one
# that is cut off before it and one that is not complete after it.
PROMPT_TAIL = 8
# What decoders write for bytes that are no character, and for a character that is not complete.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes: of this many waiting tokens only the last character can be incomplete.
MAX_WAITING = 4


class Detokenizer:
    """Turns tokens into text one at a time, at a cost that does not grow with the text.

    Only a short window of tokens is decoded: those of the last piece of text, and those that wait for the
    rest of their character. The pieces joined are the whole decoded at once (but for decoders that undo good
    characters when bad bytes follow: what is out stays out).

    Args:
        decode: token ids to text.
        prompt_ids: the tokens that the text continues.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()):
        self._decode = decode
        self._window = list(prompt_ids[-PROMPT_TAIL:])
        # Tokens of a character that the prompt only begins: new ones may complete it, and then it is new text.
        self._begun, start = self._find_begun()
        self._window = self._window[start:]
        self._done = len(self._window) - self._begun  # tokens of the window that do not wait
        self._sent = len(decode(self._window[: self._done]))  # characters of the window's text that are out

    def _find_begun(self) -> tuple[int, int]:
        """How many last tokens of the window to leave out, and how many first ones, so that it ends in a character."""
        size = len(self._window)
        for begun in range(min(MAX_WAITING, size + 1)):
            for start in range(max(1, min(MAX_WAITING, size - begun))):
                if not self._decode(self._window[start : size - begun]).endswith(REPLACEMENT):
                    return begun, start
        return 0, 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it settles, maybe none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        half = text.endswith(REPLACEMENT)
        if half and len(self._window) - self._done < MAX_WAITING:
            return ""
        piece = self._new(text[: len(text) - half])
        if not piece and not half and self._sent:
            self._window.pop()  # a special token: the window must go on starting with text
            return ""
        self._window = self._window[-MAX_WAITING:] if half else self._window[self._done :]
        self._done = 1 if half else len(self._window)
        self._sent = len(self._decode(self._window)) - half
        self._begun = 0
        return piece

    def flush(self) -> str:
        """The text of the tokens still waiting, incomplete as it may be; no token may follow."""
        return self._new(self._decode(self._window))

    def _new(self, text: str) -> str:
        """The window's text that is not out, less what stands for a character that the prompt left incomplete."""
        piece = text[self._sent :]
        return piece[min(self._begun, len(piece) - len(piece.lstrip(REPLACEMENT))) :]


class StopScanner:
    """Holds back text that may be the beginning of a stop string, and ends the text before the first one.

    Which string stops, and where, does not depend on how the text was cut into pieces. Special tokens count
    as they are spelled, though they are no part of the text that comes out.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held, self._shown = "", ""  # and for each character of it whether it comes out: "1" or "0"
        self.hit: str | None = None  # the stop string that ended the text

    def push(self, piece: str, special: str = "") -> str:
        """Add text, and after it a special token; return what certainly stands before any stop string. Once `hit` is
        set the text is over."""
        self._held += piece + special
        self._shown += "1" * len(piece) + "0" * len(special)
        text = self._held
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, at, self.hit = min(found)
            out = self._take(at)
            self._held = self._shown = ""
            return out
        return self._take(len(text) - max((_overlap(text, s) for s in self._stop), default=0))

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """The first characters of what is held, without special tokens."""
        out, shown = self._held[:count], self._shown[:count]
        self._held, self._shown = self._held[count:], self._shown[count:]
        return out if "0" not in shown else "".join(c for c, yes in zip(out, shown, strict=True) if yes == "1")


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
