"""The preallocated key/value cache: rows that are handed out to texts, and what tokens each holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.device import require_memory
from dejavu.errors import CapacityError, ConfigError

# Tokens of one row that a step may read together, with lazy keys and values: the ring has room for them beside those
# that wait.
BURST = 8


@dataclass
class KVCache:
    """Keys and values of every layer: k, v (L, R, G, S, D) in the weights' dtype, of R rows of S tokens each.

    `hidden` (L, R, Q, C) float32 and `kv_len` (L, R, G) int32 serve lazy keys and values (kernels.reference.attn_qkv):
    the normalised inputs of the last Q tokens, and how many tokens each group has projected; None otherwise. Fewer than
    `pending` tokens wait between steps.
    `cos_sin` (S, D) float32 is the rotary table of these S positions, or None for learned positions.

    The host knows what tokens each row holds. Whoever decodes a text takes a row, and releases it at the text's end.
    """

    k: Tensor
    v: Tensor
    cos_sin: Tensor | None
    hidden: Tensor | None
    kv_len: Tensor | None
    pending: int = 0
    _ids: list[list[int]] = field(init=False)
    _free: list[int] = field(init=False)

    def __post_init__(self):
        self._ids = [[] for _ in range(self.rows)]
        self._free = list(range(self.rows))

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        empty: Callable,
        cos_sin: Tensor | None,
        pending: int | None,
    ) -> KVCache:
        """Room for `capacity` tokens in each row; memory that is never written is never touched."""
        L, G = config.num_hidden_layers, config.num_key_value_heads
        shape = (L, rows, G, capacity, config.head_dim)
        k, v = empty(shape, dtype), empty(shape, dtype)
        if pending is None:
            return cls(k, v, cos_sin, None, None)
        hidden = empty((L, rows, pending + BURST - 1, config.hidden_size), torch.float32)
        return cls(k, v, cos_sin, hidden, empty((L, rows, G), torch.int32).zero_(), pending)

    @staticmethod
    def require_memory(
        config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, pending: int | None, device: torch.device
    ) -> None:
        """Raises: CapacityError where such a cache, once full, is larger than the free memory. The system itself gives
        its pages one by one as tokens come, when it is too late to refuse."""
        L, D = config.num_hidden_layers, config.head_dim
        token = 2 * L * config.num_key_value_heads * D * dtype.itemsize
        ring = 0 if pending is None else L * (pending + BURST - 1) * config.hidden_size * 4
        table = 0 if config.rope is None else capacity * D * 4
        require_memory(
            rows * (capacity * token + ring) + table,
            device,
            f"keys and values of {rows} x {capacity:,} tokens",
            "use fewer rows, a shorter prompt or fewer new tokens",
        )

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[3]

    def take(self) -> int:
        """A row that nobody has, empty. Raises: CapacityError where there is none."""
        if not self._free:
            raise CapacityError(f"all {self.rows} rows of the cache are taken")
        row = self._free.pop(0)
        self.truncate(row, 0)
        return row

    def release(self, row: int) -> None:
        """Give a row back that `take` gave."""
        assert row not in self._free
        self._free.append(row)
        self._free.sort()

    def tokens(self, row: int) -> tuple[int, ...]:
        """The tokens that a row holds."""
        return tuple(self._ids[row])

    def length(self, row: int) -> int:
        """How many tokens a row holds."""
        return len(self._ids[row])

    def require_room(self, row: int, count: int) -> None:
        """Raises: ConfigError for a row that does not exist; CapacityError where `count` tokens more have no room."""
        if not 0 <= row < self.rows:
            raise ConfigError(f"row must be in [0, {self.rows}), found {row}")
        if self.length(row) + count > self.capacity:
            raise CapacityError(
                f"row {row} is full: the cache holds {self.capacity} tokens a row, found {self.length(row) + count}"
            )

    def require_burst(self, count: int) -> None:
        """Raises: ConfigError where a step may not read so many tokens of one row."""
        if self.kv_len is not None and count > BURST:
            raise ConfigError(f"with lazy keys and values a step reads at most {BURST} tokens of a row, found {count}")

    def append(self, row: int, ids: Sequence[int]) -> None:
        """Note that tokens were put behind those of a row: whoever writes keys and values calls it."""
        self._ids[row] += ids

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a row from position `length` on."""
        assert 0 <= length <= self.length(row)
        del self._ids[row][length:]
        self.settle(row)

    def settle(self, row: int) -> None:
        """Forget what a step or pass has put behind the tokens of a row that it did not append."""
        if self.kv_len is not None:
            # Earlier tokens that wait are still in the ring, which is larger than what waits.
            self.kv_len[:, row].clamp_(max=self.length(row))
