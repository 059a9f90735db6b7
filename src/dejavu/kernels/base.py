"""What a decoder runs on: the ops of a step, memory for weights and caches, and how a step is recorded and replayed.

`Backend` itself is the plain PyTorch one, whose ops say what every other's mean (reference.py). A backend for a device
has ops of its own and overrides whatever the device can do better.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from math import prod
from threading import local
from time import perf_counter
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from dejavu.device import check_threads, multiplies_bf16
from dejavu.kernels import reference, shapes
from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Tokens

# Weights that `matmul` converts to float32 at a time on a CPU: 64 MB.
_CONVERT_ELEMENTS = 16 << 20


class Recording(Protocol):
    """The ops that a piece of work called, on the tensors that it called them with."""

    def replay(self) -> None:
        """Run them again, in order, on what the tensors hold now. A GPU may still be at it when this returns."""

    def replay_timed(self) -> dict[str, float] | None:
        """Replay, and tell the seconds that each kind of op took; None, and nothing is run, where that is not known."""


def _checked(name: str) -> Callable:
    """An op of the module that a backend was given, after a look at its arguments (shapes.py)."""
    check, meaning = getattr(shapes, name), getattr(reference, name)

    @wraps(meaning)
    def op(self: Backend, *args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return getattr(self._ops, name)(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    op.__signature__ = inspect.Signature([own, *inspect.signature(meaning).parameters.values()])
    return op


class Backend:
    """The ops, and the device that they run on.

    Args:
        ops: a module with the ops of reference.py.
    Attributes:
        name: what `--backend` calls it.
        device: where weights, caches and the inputs of ops lie.
        can_record: `record` works. All that changes from step to step (ids, positions, counts) lives in tensors.
        records_torch: what a recorded piece of work does with PyTorch's own ops is recorded with ours.
    """

    name = "reference"
    device = torch.device("cpu")
    can_record = False
    records_torch = False

    embed = _checked("embed")
    add_positions = _checked("add_positions")
    add_norm = _checked("add_norm")
    linear = _checked("linear")
    attn_qkv = _checked("attn_qkv")
    attend = _checked("attend")
    attn_out = _checked("attn_out")
    mlp = _checked("mlp")
    select_threshold = _checked("select_threshold")
    select_topk = _checked("select_topk")

    def __init__(self, ops: ModuleType = reference):
        self._ops = ops
        self._kept = local()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for weights and caches."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def record(
        self,
        work: Callable[[], object],
        rehearse: Callable[[], AbstractContextManager] = nullcontext,
        shares: Recording | None = None,
    ) -> Recording:
        """Record the ops that `work` calls; `replay` runs them, and nothing has run before it.

        Args:
            rehearse: a context in which `work` may run once before, without a trace: a GPU's kernels are compiled at
                their first call, which cannot be recorded.
            shares: another recording, which never runs at the same time: what both need only while they run may lie in
                the same memory.
        """
        raise NotImplementedError(f"backend {self.name} records nothing")

    def beside(self, work: Callable[[], Sequence[Tensor]], *inputs: Tensor) -> Callable[[], Sequence[Tensor]]:
        """Start work that is not needed yet; the function returned waits for it. Call it once, where it is needed.

        Args:
            inputs: what the work reads and the caller may free before the work has ended.
        """
        result = work()
        return lambda: result

    def choose(self, logits: Tensor, tokens: Tokens) -> Tensor:
        """The likeliest next tokens (N,) int32 of logits (N, V), also put where the next step reads them: they become
        `ids`, and `positions` grow by 1. -1 is returned for a token whose logits are not all finite."""
        chosen = logits.argmax(1).int()
        tokens.ids.copy_(chosen)
        tokens.positions.add_(tokens.rows >= 0)
        low, high = logits.aminmax(dim=1)
        return torch.where(torch.isfinite(low) & torch.isfinite(high), chosen, -1)

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a result to the host; the function returned waits for it. The tensor may change at once."""
        copy = tensor.clone()
        return lambda: copy

    def wait(self) -> None:
        """Until all that was started has ended."""

    def set_threads(self, n: int) -> None:
        """Use `n` CPU threads for all that follows. Raises: ConfigError as device.check_threads does."""
        check_threads(n)
        torch.set_num_threads(n)

    def num_threads(self) -> int:
        """CPU threads in use."""
        return torch.get_num_threads()

    def read_bandwidth(self, num_bytes: int, repeats: int) -> float:
        """Bytes per second at which the device reads memory: the best of `repeats` passes over a buffer."""
        buffer = torch.ones(num_bytes // 4)
        best = float("inf")
        for _ in range(repeats):
            began = perf_counter()
            buffer.sum()
            best = min(best, perf_counter() - began)
        return buffer.nbytes / best

    # Many tokens at once: matrix products.

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what activations are multiplied fastest with weights of a dtype; sums are float32 all the same."""
        return torch.bfloat16 if dtype == torch.bfloat16 and multiplies_bf16() else torch.float32

    def matrix(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Weights (..., K) as a matrix (N, K) for `matmul` with activations of a dtype.

        A view where they are one as they lie; otherwise in memory that this thread's next call writes over. Plain
        weights keep their own dtype.
        """
        if isinstance(weight, Tensor):
            return (
                weight if weight.dim() == 2 else self._scratch(weight.shape, weight.dtype).copy_(weight).flatten(0, -2)
            )
        return weight.dequantize(out=self._scratch(weight.shape, dtype)).flatten(0, -2)

    def matmul(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ w + bias, (T, N) in the dtype of x. x: (T, K) float32, or in the dtype of w; w: (K, N); bias: (N,)."""
        if x.dtype != torch.float32:
            return x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
        # A CPU without bf16 arithmetic multiplies bf16 matrices 15 times slower than float32 ones: convert, by pieces.
        step = max(1, _CONVERT_ELEMENTS // len(w))
        pieces = [x @ w[:, n : n + step].float() for n in range(0, w.shape[1], step)]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return out if bias is None else out + bias

    def _scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of this thread's, the same at each call: new pages would cost more than what is written to them."""
        size = prod(shape) * dtype.itemsize
        if getattr(self._kept, "scratch", None) is None or len(self._kept.scratch) < size:
            with torch.inference_mode(False):
                self._kept.scratch = torch.empty(size, dtype=torch.uint8)
        return self._kept.scratch[:size].view(dtype).view(shape)


BACKEND = Backend
