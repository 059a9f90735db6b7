"""Neurons by maximum inner product search over the input rows: the paper's formulation of the problem (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Weights
from dejavu.config import ModelConfig
from dejavu.errors import KernelUnavailable
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import dequantized
from dejavu.selection.selector import Cuts, ScoreSelector


class NearestSelector(ScoreSelector):
    """The k neurons whose (gate) pre-activation is largest, by an HNSW graph over the rows with their biases.

    The search runs on the host between kernels, so the step is not captured.
    Raises: KernelUnavailable where hnswlib is not installed.
    """

    capturable = False

    def __init__(self, cuts: Cuts, config: ModelConfig, weights: Weights, ops: Backend):
        try:
            import hnswlib
        except ImportError as error:
            raise KernelUnavailable("policy nearest needs hnswlib: pip install 'dejavu[ann]'") from error
        super().__init__(cuts, ops)
        self._total = config.intermediate_size
        self._indexes = []
        for (_, cut), layer in zip(cuts, weights.layers, strict=True):
            if cut is None:
                self._indexes.append(None)
                continue
            rows, bias = dequantized(layer.mlp.rows[:, 0]).cpu(), layer.mlp.in_bias
            bias = torch.zeros(len(rows), 1) if bias is None else bias.view(len(rows), -1)[:, :1].cpu()
            index = hnswlib.Index(space="ip", dim=rows.shape[1] + 1)
            index.init_index(max_elements=len(rows), ef_construction=200, M=32, random_seed=0)
            index.set_ef(max(2 * cut.k, 64))
            index.set_num_threads(1)
            index.add_items(torch.cat((rows, bias), 1).numpy(), num_threads=1)
            self._indexes.append(index)

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> None:
        """All heads are read."""

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        """The inner products of the neurons found; minus infinity for all others."""
        cut = self.cuts[layer][1]
        if cut is None:
            return None
        query = torch.cat((y.cpu(), torch.ones(len(y), 1)), 1)
        found, distances = self._indexes[layer].knn_query(query.numpy(), k=cut.k, num_threads=1)
        scores = torch.full((len(y), self._total), -torch.inf)
        # hnswlib's distance of space "ip" is one minus the inner product.
        return scores.scatter_(1, torch.from_numpy(found.astype("int64")), 1 - torch.from_numpy(distances)).to(y.device)
