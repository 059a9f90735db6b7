"""Memory on the GPU, a decode step as one CUDA graph, and work beside the step on a second stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
_sequential = False


class Graph(torch.cuda.CUDAGraph):
    """A captured step; `replay` starts it."""

    def replay_timed(self) -> None:
        """Kernels of a graph are not timed one by one."""


@dataclass
class Capture:
    """What capture() yields; `graph.replay()` runs what was captured."""

    graph: Graph


@contextmanager
def capture(shares: Graph | None = None) -> Iterator[Capture]:
    """Record the ops called inside as one CUDA graph, in the memory pool of `shares`; None: in one of its own.

    Nothing runs until `.graph.replay()`. Run the same step once before: kernels are compiled at their first call, which
    cannot be captured. Raises: KernelUnavailable, by the first op that would have to be.
    """
    holder = Capture(Graph())
    with torch.cuda.graph(holder.graph, pool=None if shares is None else shares.pool()):
        yield holder


@contextmanager
def sequential() -> Iterator[None]:
    """Inside, `beside` puts its work in line with everything else: to measure what overlapping is worth."""
    global _sequential
    before, _sequential = _sequential, True
    try:
        yield
    finally:
        _sequential = before


def beside(work: Callable[[], Sequence[Tensor]], *inputs: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Start work on a second stream, beside what the caller does next; can be captured.

    Args:
        work: calls ops on `inputs` and on tensors that nobody changes meanwhile. Select in one stream only: rankings
            share memory.
        inputs: what the work reads that the caller may free before the work has ended.
    Returns: a function that makes the current stream wait for the work and returns its tensors. Call it, once, before
        the capture ends.
    """
    if DEVICE == "cpu" or _sequential:
        result = work()
        return lambda: result
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    done = torch.cuda.Event()
    with torch.cuda.stream(side):
        result = work()
        done.record()
    # Memory is used again only when both streams are through with it.
    for tensor in inputs:
        tensor.record_stream(side)

    def join() -> Sequence[Tensor]:
        stream = torch.cuda.current_stream()
        stream.wait_event(done)
        for tensor in result:
            tensor.record_stream(stream)
        return result

    return join


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # A high priority: its few small programs are not to stand behind the many of a matrix.
    return torch.cuda.Stream(device, priority=-1)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for weights and caches, on the current GPU."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)
