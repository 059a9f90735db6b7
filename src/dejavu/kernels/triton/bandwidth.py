"""The read bandwidth of a GPU, as a kernel like ours can have it: the ceiling of a decode step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dejavu.kernels.triton import tuning


@triton.jit
def _read(words_ptr, sums_ptr, N, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0), num_stages=4):
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(words_ptr + at, mask=at < N, other=0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read_bandwidth(num_bytes: int, repeats: int) -> float:
    """Bytes per second at which the current GPU reads its memory; the best of `repeats` passes over `num_bytes`."""
    words = torch.ones(num_bytes // 4, dtype=torch.int32, device="cuda")
    sums = torch.empty(tuning.PROGRAMS, dtype=torch.int32, device="cuda")

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _read[(tuning.PROGRAMS,)](words, sums, words.numel(), BLOCK=4096)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    seconds()
    assert sums.sum().item() == words.numel()
    return words.nbytes / min(seconds() for _ in range(repeats))
