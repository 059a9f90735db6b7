"""What decode steps have read."""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.config import ModelConfig


class Counts:
    """Sums over the steps since the last reset, by layer; steps add to them on the model's device.

    `rows_read` (L, R) int64 are the rows of each kind that the MLPs read. `attn_read` (L, 3) int64: query heads read,
    groups whose cache was read, and groups whose keys and values were projected. `steps` and `tokens` tell how many
    steps there were, and of how many tokens.
    """

    def __init__(self, config: ModelConfig, device: torch.device):
        L, kinds = config.num_hidden_layers, 3 if config.gated else 2
        self.rows_read = torch.zeros(L, kinds, dtype=torch.int64, device=device)
        self.attn_read = torch.zeros(L, 3, dtype=torch.int64, device=device)
        self.steps = self.tokens = 0

    def reset(self) -> None:
        self.rows_read.zero_()
        self.attn_read.zero_()
        self.steps = self.tokens = 0

    @property
    def heads_read(self) -> Tensor:
        """Query heads read by each layer, (L,) int64."""
        return self.attn_read[:, 0]
