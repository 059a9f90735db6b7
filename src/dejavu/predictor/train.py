"""Predictors of one layer, from what was collected.

Heads: one linear layer to the logarithm of each head's contribution, in closed form. Neurons: two layers. They start as
the best linear map of their rank from the input they read to the pre-activations (reduced-rank regression: a truncated
SVD of fc1, weighted by where the inputs lie), and are then trained to tell active neurons from others, where missing a
neuron costs what it contributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Mlp
from dejavu.kernels import reference
from dejavu.kernels.quantized import LINE, RowFormat, Weight, dequantized, quantize
from dejavu.predictor.collect import Collected
from dejavu.selection.block import HEADS, Block
from dejavu.selection.predictor import Predictor

BATCH = 512
# A batch is made of runs of this many tokens from random places: a run is one read.
RUN = 32
# Weight of an inactive neuron against an active one of mean squared contribution. On layer 4 of opt-mini 0.1 held
# 99.21 % of the squared norm at 1.5 times the active density, 0.3 99.15 %; weights of the contribution itself 99.14 %.
INACTIVE_WEIGHT = 0.1
# Tokens that the closed forms look at.
FIT_TOKENS = 16_384
# Candidates of the automatic rank are shares of hidden_size; each is trained on this share of the steps.
RANK_SHARES, TRIAL = (1 / 8, 1 / 4, 3 / 8, 1 / 2), 1 / 6
# Of the active neurons' squared norm, what the selected ones must hold when ranks are compared: about what the cuts of
# opt-mini hold at a rise of perplexity of 1 %, most of which goes to heads.
TRIAL_RECALL = 0.998


@dataclass
class Data:
    """One block's examples: inputs (T, C) float32 by rows, and the contributions' norms (T, N) float32 by rows."""

    inputs: Callable[[slice], Tensor]
    norms: Callable[[slice], Tensor]
    train: int  # rows to learn from; those after them are for judging
    total: int

    def judge(self) -> tuple[Tensor, Tensor]:
        """Inputs and norms of the rows that were kept aside."""
        rows = slice(self.train, self.total)
        return self.inputs(rows), self.norms(rows)


def block_data(collected: Collected, block: Block, source: Block, train: int) -> Data:
    """Examples of a block's units, predicted from the input of the block `source`."""
    heads = block.part == HEADS
    norms = partial(collected.heads, block.layer) if heads else collected.neurons(block.layer)
    return Data(lambda rows: collected.inputs(source, rows), norms, train, collected.tokens)


# Weights of a predictor in float32: down (R, C), None for a single layer; up (N, R); bias (N,).
Parameters = tuple[Tensor | None, Tensor, Tensor]


def stored(parameters: Parameters, form: RowFormat | None) -> Predictor:
    """The predictor of these weights, quantised to a format, or in bf16."""

    def rows(weight: Tensor) -> Weight:
        return weight.bfloat16().contiguous() if form is None else quantize(weight, form)

    down, up, bias = parameters
    return Predictor(None if down is None else rows(down), rows(up), bias.contiguous())


def fit_heads(data: Data) -> Parameters:
    """The linear map to log2 of the heads' norms with the least squared error."""
    y = data.inputs(slice(0, data.train))
    target = data.norms(slice(0, data.train)).clamp(min=2.0**-14).log2()
    weight, bias = _regression(y, target)
    return None, weight.T.contiguous(), bias


def fit_neurons(
    data: Data,
    own_inputs: Tensor,
    mlp: Mlp,
    rank: int,
    *,
    epochs: int,
    train: bool,
    seed: int,
    form: RowFormat | None,
) -> Parameters:
    """The weights of a layer's predictor.

    Args:
        own_inputs: (T, C) float32, inputs of the MLP itself for the first rows of the data.
        rank: 0 tries RANK_SHARES and takes the one whose bytes, with those of the neurons that it then selects, are
            fewest.
        form: in which they will be stored.
    """
    start = _regressed(data, own_inputs, mlp)
    steps = max(1, epochs * data.train // BATCH)
    if rank == 0:
        hidden = mlp.rows.shape[2]
        ranks = sorted({max(16, round(hidden * share / LINE) * LINE) for share in RANK_SHARES})
        trials = [(r, _train(data, start(r), int(steps * TRIAL), seed) if train else start(r)) for r in ranks]
        rank = min(trials, key=lambda trial: _bytes_needed(data, stored(trial[1], form), mlp))[0]
    return _train(data, start(rank), steps, seed) if train else start(rank)


def _regressed(data: Data, own_inputs: Tensor, mlp: Mlp) -> Callable[[int], Parameters]:
    """A function from a rank to the reduced-rank regression of the (gate) pre-activations."""
    n = len(own_inputs)
    bias = None if mlp.in_bias is None else mlp.in_bias.view(mlp.rows.shape[0], -1)[:, 0]
    pre = F.linear(own_inputs, dequantized(mlp.rows[:, 0]), bias)
    y = data.inputs(slice(0, n))
    weight, offset = _regression(y, pre)  # (C, I)
    centred = y - y.mean(0)
    # Singular vectors of the fitted values: project onto the directions in which they vary most.
    half = torch.linalg.cholesky(centred.T @ centred / n + _ridge(centred))
    fitted = half.T @ weight  # (C, I), the same covariance as the fitted values
    _, vectors = torch.linalg.eigh(fitted @ fitted.T)
    scale = 3.0 / pre.std()

    def parameters(rank: int) -> Parameters:
        basis = vectors[:, -rank:]  # (C, R)
        down = torch.linalg.solve_triangular(half.T, basis, upper=True).T  # (R, C), outputs of unit variance
        up = (basis.T @ fitted).T * scale  # (I, R)
        middle = F.linear(y.mean(0), weight.T) + offset
        return down, up, middle * scale - up @ (down @ y.mean(0))

    return parameters


def _train(data: Data, start: Parameters, steps: int, seed: int) -> Parameters:
    """Cross entropy of active against not, each active neuron weighted by its squared contribution."""
    down, up, bias = (p.clone().requires_grad_() for p in start)
    optimizer = torch.optim.Adam([{"params": [down], "lr": 1e-3}, {"params": [up, bias], "lr": 3e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    generator = torch.Generator().manual_seed(seed)
    sample = data.norms(slice(0, min(data.train, 2048)))
    mean = sample[sample > 0].square().mean().clamp(min=1e-12)
    runs = data.train // RUN
    order = torch.randperm(runs, generator=generator)
    at = 0
    for _ in range(steps):
        if at + BATCH // RUN > runs:
            order, at = torch.randperm(runs, generator=generator), 0
        rows = [slice(r * RUN, (r + 1) * RUN) for r in order[at : at + BATCH // RUN].tolist()]
        at += BATCH // RUN
        y = torch.cat([data.inputs(r) for r in rows])
        norms = torch.cat([data.norms(r) for r in rows])
        active = norms > 0
        weight = torch.where(active, norms.square() / mean, INACTIVE_WEIGHT)
        scores = F.linear(F.linear(y, down), up, bias)
        loss = F.binary_cross_entropy_with_logits(scores, active.float(), weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return down.detach(), up.detach(), bias.detach()


def _bytes_needed(data: Data, predictor: Predictor, mlp: Mlp) -> float:
    """Bytes a token reads of this predictor, and of the neurons it must select.

    Whole neurons: where rows are short, the hardware prefetches the output rows that are skipped (docs/log.md).
    """
    y, norms = data.judge()
    scores = predictor.scores(reference.linear, y)
    square = norms.pow(2)
    order = scores.flatten().argsort(descending=True)
    held = square.flatten()[order].double().cumsum(0)
    selected = int((held < TRIAL_RECALL * held[-1]).sum()) + 1
    return predictor.nbytes + selected / len(y) * mlp.rows[0].nbytes


def _regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, N) and bias (N,) of the least-squares map x (T, C) -> y (T, N)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    weight = torch.linalg.solve(x.T @ x / len(x) + _ridge(x), x.T @ (y - mean_y) / len(x))
    return weight, mean_y - mean_x @ weight


def _ridge(centred: Tensor) -> Tensor:
    """Enough of the identity to keep a covariance invertible."""
    return 1e-3 * centred.var(0).mean().clamp(min=1e-12) * torch.eye(centred.shape[1])
