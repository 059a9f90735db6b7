"""The preallocated key/value cache of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.device import require_memory


@dataclass
class KVCache:
    """Keys and values of every layer: k, v (L, B, G, S, D) in the weights' dtype.

    `hidden` (L, B, P, C) float32 and `kv_len` (L, B, G) int32 serve lazy keys and values (kernels.reference.attn_qkv):
    the normalised inputs of the last P tokens, and how many tokens each group has projected; None otherwise.
    `cos_sin` (S, D) float32 is the rotary table of these S positions, or None for learned positions.
    How many tokens a row holds is the caller's to know; the kernels take it from `positions`.
    """

    k: Tensor
    v: Tensor
    cos_sin: Tensor | None
    hidden: Tensor | None
    kv_len: Tensor | None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        empty: Callable,
        cos_sin: Tensor | None,
        pending: int | None,
    ) -> KVCache:
        """Room for `capacity` tokens in each of `batch` rows; memory that is never written is never touched."""
        L, G = config.num_hidden_layers, config.num_key_value_heads
        shape = (L, batch, G, capacity, config.head_dim)
        hidden = None if pending is None else empty((L, batch, pending, config.hidden_size), torch.float32)
        kv_len = None if pending is None else empty((L, batch, G), torch.int32).zero_()
        return cls(empty(shape, dtype), empty(shape, dtype), cos_sin, hidden, kv_len)

    @staticmethod
    def require_memory(
        config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, pending: int | None, device: torch.device
    ) -> None:
        """Raises: CapacityError where such a cache, once full, is larger than the free memory. The system itself gives
        its pages one by one as tokens come, when it is too late to refuse."""
        L, D = config.num_hidden_layers, config.head_dim
        token = 2 * L * config.num_key_value_heads * D * dtype.itemsize
        ring = 0 if pending is None else L * pending * config.hidden_size * 4
        table = 0 if config.rope is None else capacity * D * 4
        require_memory(
            batch * (capacity * token + ring) + table,
            device,
            f"keys and values of {batch} x {capacity:,} tokens",
            "use fewer rows, a shorter prompt or fewer new tokens",
        )

    @contextmanager
    def unchanged(self, positions: Tensor) -> Iterator[None]:
        """Inside, a step may repeat the tokens at `positions` (B,) int64 with another selection; then it is undone.

        What it writes of earlier tokens stays: these were pending, and are projected anew, from the same inputs.
        """
        rows, every = torch.arange(self.batch, device=positions.device), slice(None)
        places = [(self.k, (every, rows, every, positions)), (self.v, (every, rows, every, positions))]
        if self.hidden is not None:
            places += [(self.hidden, (every, rows, positions % self.hidden.shape[2])), (self.kv_len, ())]
        before = [tensor[place].clone() for tensor, place in places]
        try:
            yield
        finally:
            for (tensor, place), value in zip(places, before, strict=True):
                tensor[place] = value

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]
