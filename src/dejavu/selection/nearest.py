"""Neurons by maximum inner product search over the input rows: the paper's formulation of the problem (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Weights
from dejavu.config import ModelConfig
from dejavu.errors import KernelUnavailable
from dejavu.kernels.reference import Selection


class NearestSelector:
    """The k neurons whose (gate) pre-activation is largest, by an HNSW graph over the rows with their biases.

    The search runs on the host between kernels, so the step is not captured.
    Raises: KernelUnavailable where hnswlib is not installed.
    """

    capturable = False

    def __init__(self, counts: Sequence[tuple[int, int]], config: ModelConfig, weights: Weights, ops: ModuleType):
        try:
            import hnswlib
        except ImportError as error:
            raise KernelUnavailable("policy nearest needs hnswlib: pip install 'dejavu[ann]'") from error
        self._counts, self._total = counts, config.intermediate_size
        self._indexes = []
        for (_, k), layer in zip(counts, weights.layers, strict=True):
            rows, bias = layer.mlp.rows[:, 0].float(), layer.mlp.in_bias
            bias = torch.zeros(len(rows), 1) if bias is None else bias.view(len(rows), -1)[:, :1]
            index = hnswlib.Index(space="ip", dim=rows.shape[1] + 1)
            index.init_index(max_elements=len(rows), ef_construction=200, M=32, random_seed=0)
            index.set_ef(max(2 * k, 64))
            index.set_num_threads(1)
            index.add_items(torch.cat((rows, bias), 1).numpy(), num_threads=1)
            self._indexes.append(index)

    def advance(self) -> None:
        """Every step searches afresh."""

    def begin(self, x: Tensor) -> None:
        """The embedding alone doesn't matter."""

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        return None

    def neurons(self, layer: int, y: Tensor) -> Selection:
        k = self._counts[layer][1]
        if k >= self._total:
            return None
        query = torch.cat((y, torch.ones(len(y), 1)), 1)
        found, _ = self._indexes[layer].knn_query(query.numpy(), k=k, num_threads=1)
        idx = torch.from_numpy(found.astype("int32")).unique()
        return idx, torch.tensor([idx.numel()], dtype=torch.int32)
