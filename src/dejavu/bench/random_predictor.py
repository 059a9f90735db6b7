"""Predictors of random weights: what looking ahead costs, not how well it sees."""

from __future__ import annotations

from statistics import NormalDist

import torch

from dejavu.bench.shapes import fill_noise, fill_quantized
from dejavu.config import ModelConfig, SelectionConfig
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized, RowFormat, Weight
from dejavu.selection import Cut
from dejavu.selection.block import HEADS, Block
from dejavu.selection.predictor import Lookahead, Predictor, PredictorSelector


def predictor_rank(config: ModelConfig, quantized: RowFormat | None = None) -> int:
    """Of the neurons' predictors: at the paper's densities they are about 6 % of what a step reads of bf16 weights, in
    int4 3 %, and then 10 % of what it reads of int4 weights."""
    return max(32, config.hidden_size // (32 if quantized is None else 16))


def random_predictor(
    config: ModelConfig,
    ops: Backend,
    selection: SelectionConfig,
    dtype: torch.dtype = torch.bfloat16,
    quantized: RowFormat | None = None,
    *,
    by_threshold: bool = False,
) -> PredictorSelector:
    """Low-rank scores of neurons and linear scores of heads, each a block ahead, in which every token keeps the best:
    so that a single token's densities are those asked for. In random models the rows of a batch have hidden states that
    are much alike, so their union is smaller than that of independent rows (settings.fixed_sets).

    By threshold, as in a fitted pack, a token's densities are only about those asked for: scores of random weights are
    normal, of unit size.

    Args:
        ops: the kernel backend, whose `empty` allocates.
        selection: its densities alone count.
        dtype, quantized: of the predictors' matrices; a format goes before the dtype.
    Raises: ConfigError for densities that don't fit the model.
    """
    C, rank = config.hidden_size, predictor_rank(config, quantized)
    predictors, cuts = {}, []

    def cut(k: int, n: int) -> Cut:
        return Cut(min(n, 2 * k), NormalDist().inv_cdf(1 - k / n)) if by_threshold else Cut(k)

    def matrix(rows: int, width: int) -> Weight:
        return _random((rows, width), ops, dtype, quantized)

    for layer in range(config.num_hidden_layers):
        totals = config.num_attention_heads, config.intermediate_size
        kept = selection.counts(layer, config)
        cuts.append(tuple(cut(k, n) if k < n else None for k, n in zip(kept, totals, strict=True)))
        for part, (units, limit) in enumerate(zip(totals, cuts[-1], strict=True)):
            if limit is not None:
                down, up = (None, matrix(units, C)) if part == HEADS else (matrix(rank, C), matrix(units, rank))
                bias = ops.empty((units,), torch.float32).zero_()
                predictors[Block(layer, part)] = Predictor(down, up, bias)
    return PredictorSelector(predictors, Lookahead(), cuts, config, ops)


def _random(shape: tuple[int, int], ops: Backend, dtype: torch.dtype, form: RowFormat | None) -> Weight:
    if form is not None:
        weight = Quantized(ops.empty((shape[0], form.row_bytes(shape[1])), torch.uint8), shape[1], form)
        fill_quantized(weight, shape[1] ** -0.5)
    else:
        weight = ops.empty(shape, dtype)
        fill_noise([(weight, shape[1] ** -0.5)], seed=shape[0])
    return weight
