"""Times several things in turn, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

Run = Callable[[], Sequence[float]]
Build = Callable[[], dict[str, Run]]
Started = Callable[[str], None]
Finished = Callable[[dict[str, list[float]], int], None]


def interleave(
    builds: Sequence[Build],
    repeat: int,
    *,
    warmup: int = 1,
    keep: bool = True,
    started: Started = lambda _: None,
    finished: Finished | None = None,
) -> dict[str, list[float]]:
    """Run everything once a round, in order, for `repeat` rounds: A B A B ...

    Args:
        builds: each prepares named runs that belong together (over the same weights, say). A run does its work
            and returns the seconds of each unit of it: of each token, or of the one call.
        warmup: rounds before the first that counts.
        keep: prepare once and hold everything in memory. False: prepare, run and free one after the other in
            every round, for things that don't fit side by side.
        started: called with the name of a run before it starts.
        finished: called after each round that counts with the times so far, and the number of such rounds.
    Returns: for each run, the seconds of all units of all rounds, in order.
    """
    times: dict[str, list[float]] = defaultdict(list)
    prepared = [build() for build in builds] if keep else None

    def measure(runs: dict[str, Run], number: int) -> None:
        for name, run in runs.items():
            started(name)
            seconds = run()
            if number >= 0:
                times[name] += seconds

    for number in range(-warmup, repeat):
        for i, build in enumerate(builds):
            measure(prepared[i] if keep else build(), number)
            if not keep:
                gc.collect()  # a model with reference cycles would otherwise still fill the memory of the next
        if finished is not None and number >= 0:
            finished(dict(times), number + 1)
    return dict(times)


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in milliseconds: `p20_ms`, `p50_ms`, `p80_ms`."""
    return {f"p{q}_ms": float(np.percentile(seconds, q)) * 1e3 for q in (20, 50, 80)}
