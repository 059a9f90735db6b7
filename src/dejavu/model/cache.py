"""The preallocated key/value cache of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import ModelConfig


@dataclass
class KVCache:
    """Keys and values of every layer: k, v (L, B, G, S, D) in the weights' dtype.

    `cos_sin` (S, D) float32 is the rotary table of these S positions, or None for learned positions.
    How many tokens a row holds is the caller's to know; the kernels take it from `positions`.
    """

    k: Tensor
    v: Tensor
    cos_sin: Tensor | None

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, empty: Callable, cos_sin: Tensor | None
    ) -> KVCache:
        """Room for `capacity` tokens in each of `batch` rows; memory that is never written is never touched."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        return cls(empty(shape, dtype), empty(shape, dtype), cos_sin)

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]
