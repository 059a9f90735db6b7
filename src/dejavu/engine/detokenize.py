"""Tokens to text while they come: never half a character, never what may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens of the prompt that are decoded before the first new one: decoders treat the start of a text apart
# (SentencePiece drops its first space), and the new text does not start there.
PROMPT_TAIL = 4
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
        self._done = len(self._window)  # tokens of the window that do not wait
        self._sent = len(decode(self._window))  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it settles, maybe none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        half = text.endswith(REPLACEMENT)
        if half and len(self._window) - self._done < MAX_WAITING:
            return ""
        piece = text[self._sent : len(text) - half]
        if not piece and not half and self._sent:
            self._window.pop()  # a special token: the window must go on starting with text
            return ""
        self._window = self._window[-MAX_WAITING:] if half else self._window[self._done :]
        self._done = 1 if half else len(self._window)
        self._sent = len(self._decode(self._window)) - half
        return piece

    def flush(self) -> str:
        """The text of the tokens still waiting, incomplete as it may be; no token may follow."""
        return self._decode(self._window)[self._sent :]


class StopScanner:
    """Holds back text that may be the beginning of a stop string, and ends the text before the first one.

    Which string stops, and where, does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held = ""
        self.hit: str | None = None  # the stop string that ended the text

    def push(self, piece: str) -> str:
        """Add text; return what certainly stands before any stop string. Once `hit` is set the text is over."""
        text = self._held + piece
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        out, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
