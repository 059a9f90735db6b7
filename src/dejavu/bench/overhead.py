"""How much of a token's time is not kernels: Python, sampling, detokenizing."""

from __future__ import annotations

from time import perf_counter

from dejavu.engine.engine import Engine
from dejavu.errors import ConfigError
from dejavu.kernels.base import Recording


class _Timed:
    """A captured step, and how long its replays took."""

    def __init__(self, recording: Recording):
        self._recording, self.seconds = recording, 0.0

    def replay(self) -> None:
        began = perf_counter()
        self._recording.replay()
        self.seconds += perf_counter() - began


def overhead_share(engine: Engine, prompt: list[int], new_tokens: int) -> float:
    """Share of the decode time of `generate` outside of the replayed tape, sampling and detokenizing included.

    Waking the threads is inside the tape and so is not counted.

    Raises: ConfigError where the step of the engine is not captured.
    """
    how = {"max_new_tokens": new_tokens, "ignore_eos": True}
    engine.generate(prompt, **how)  # makes the steps that the next call reuses
    (steps,) = engine._idle
    step = steps.step(1)
    recording = step._recording
    if recording is None:
        raise ConfigError("the overhead is measured over captured steps: use the cpu backend")
    step._recording = timed = _Timed(recording)
    try:
        stats = engine.generate(prompt, **how).stats
    finally:
        step._recording = recording
    return 1 - timed.seconds / stats.decode_s
