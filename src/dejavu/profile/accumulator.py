"""Sums that grow with every token watched, but never in size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Accumulator:
    """Keeps all that it knows in tensor attributes, so that it can be written to a file and read back."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors by name, as they are now."""
        return {name: value.numpy() for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave. Raises: KeyError or ValueError where it was of another model."""
        for name, mine in self.arrays().items():
            stored = arrays[name]
            if stored.shape != mine.shape or stored.dtype != mine.dtype:
                raise ValueError(f"{name}: expected {mine.dtype} {mine.shape}, found {stored.dtype} {stored.shape}")
            getattr(self, name).copy_(torch.from_numpy(stored))
