"""Predictors of one layer, from what was collected.

Heads: one linear layer to the logarithm of each head's contribution, in closed form. Neurons: two layers. They start as
the best linear map of their rank from the input they read to the pre-activations (reduced-rank regression: a truncated
SVD of fc1, weighted by where the inputs lie), and are then trained to tell active neurons from others, where missing a
neuron costs what it contributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Mlp
from dejavu.kernels.quantized import dense
from dejavu.predictor.collect import Collected
from dejavu.selection.predictor import Predictor

BATCH = 512
# A batch is made of runs of this many tokens from random places: a run is one read.
RUN = 32
# Weight of an inactive neuron against an active one of mean contribution: chosen on opt-mini, where 0.1 to 1 give the
# same weighted recall at equal density within 0.2 %.
INACTIVE_WEIGHT = 0.3
# Tokens that the closed forms look at.
FIT_TOKENS = 16_384
# Candidates of the automatic rank are shares of hidden_size; each is trained on this share of the steps.
RANK_SHARES, TRIAL = (1 / 16, 1 / 8, 1 / 4), 1 / 6
# Of the active neurons' squared norm, what the selected ones must hold when ranks are compared.
TRIAL_RECALL = 0.98


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


def block_data(collected: Collected, block: int, source: int, train: int) -> Data:
    """Examples of a block's units, predicted from the input of the block `source`."""
    norms = collected.neurons(block // 2) if block % 2 else lambda rows: collected.heads(block // 2, rows)
    return Data(lambda rows: collected.inputs(source, rows), norms, train, collected.tokens)


def fit_heads(data: Data, dtype: torch.dtype) -> Predictor:
    """The linear map to log2 of the heads' norms with the least squared error."""
    y = data.inputs(slice(0, data.train))
    target = data.norms(slice(0, data.train)).clamp(min=2.0**-14).log2()
    weight, bias = _regression(y, target)
    return Predictor(None, weight.T.to(dtype).contiguous(), bias)


def fit_neurons(
    data: Data,
    own_inputs: Tensor,
    mlp: Mlp,
    rank: int,
    *,
    epochs: int,
    train: bool,
    seed: int,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None = None,
) -> Predictor:
    """A layer's predictor.

    Args:
        own_inputs: (T, C) float32, inputs of the MLP itself for the first rows of the data.
        rank: 0 tries RANK_SHARES and takes the one whose bytes, with those of the neurons that it then selects, are
            fewest.
        progress: called with the share that is done.
    """
    start = _regressed(data, own_inputs, mlp)
    steps = max(1, epochs * data.train // BATCH)
    if rank == 0:
        # Multiples of 32 fill whole cache lines.
        hidden = mlp.rows.shape[2]
        ranks = sorted({max(16, round(hidden * share / 32) * 32) for share in RANK_SHARES})
        trials = [(r, _train(data, start(r), int(steps * TRIAL), seed) if train else start(r)) for r in ranks]
        rank = min(trials, key=lambda trial: _bytes_needed(data, trial[1], mlp, dtype))[0]
    down, up, bias = start(rank)
    if train:
        down, up, bias = _train(data, (down, up, bias), steps, seed, progress)
    return Predictor(down.to(dtype).contiguous(), up.to(dtype).contiguous(), bias.contiguous())


Parameters = tuple[Tensor, Tensor, Tensor]


def _regressed(data: Data, own_inputs: Tensor, mlp: Mlp) -> Callable[[int], Parameters]:
    """A function from a rank to the reduced-rank regression of the (gate) pre-activations."""
    n = len(own_inputs)
    bias = None if mlp.in_bias is None else mlp.in_bias.view(mlp.rows.shape[0], -1)[:, 0]
    pre = F.linear(own_inputs, dense(mlp.rows[:, 0]), bias)
    y = data.inputs(slice(0, n))
    weight, offset = _regression(y, pre)  # (C, I)
    centred = y - y.mean(0)
    # Singular vectors of the fitted values: project onto the directions in which they vary most.
    half = torch.linalg.cholesky(centred.T @ centred / n + _ridge(centred))
    spread = half.T @ weight  # (C, I), the same covariance as the fitted values
    _, vectors = torch.linalg.eigh(spread @ spread.T)
    scale = 3.0 / pre.std()

    def parameters(rank: int) -> Parameters:
        basis = vectors[:, -rank:]  # (C, R)
        down = torch.linalg.solve_triangular(half.T, basis, upper=True).T  # (R, C), outputs of unit variance
        up = (basis.T @ spread).T * scale  # (I, R)
        middle = F.linear(y.mean(0), weight.T) + offset
        return down, up, middle * scale - up @ (down @ y.mean(0))

    return parameters


def _train(
    data: Data, start: Parameters, steps: int, seed: int, progress: Callable[[float], None] | None = None
) -> Parameters:
    """Cross entropy of active against not, each active neuron weighted by its contribution."""
    down, up, bias = (p.clone().requires_grad_() for p in start)
    optimizer = torch.optim.Adam([{"params": [down], "lr": 1e-3}, {"params": [up, bias], "lr": 3e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    generator = torch.Generator().manual_seed(seed)
    sample = data.norms(slice(0, min(data.train, 2048)))
    mean = sample[sample > 0].mean().clamp(min=1e-6)
    runs = data.train // RUN
    order = torch.randperm(runs, generator=generator)
    at = 0
    for step in range(steps):
        if at + BATCH // RUN > runs:
            order, at = torch.randperm(runs, generator=generator), 0
        rows = [slice(r * RUN, (r + 1) * RUN) for r in order[at : at + BATCH // RUN].tolist()]
        at += BATCH // RUN
        y = torch.cat([data.inputs(r) for r in rows])
        norms = torch.cat([data.norms(r) for r in rows])
        active = norms > 0
        weight = torch.where(active, norms / mean, INACTIVE_WEIGHT)
        scores = F.linear(F.linear(y, down), up, bias)
        loss = F.binary_cross_entropy_with_logits(scores, active.float(), weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None and step % 16 == 0:
            progress((step + 1) / steps)
    return down.detach(), up.detach(), bias.detach()


def _bytes_needed(data: Data, parameters: Parameters, mlp: Mlp, dtype: torch.dtype) -> float:
    """Bytes a token reads of this predictor, and of the input rows of the neurons it must select."""
    down, up, bias = parameters
    y, norms = data.judge()
    scores = F.linear(F.linear(y, down), up, bias)
    square = norms.pow(2)
    order = scores.flatten().argsort(descending=True)
    held = square.flatten()[order].double().cumsum(0)
    selected = int((held < TRIAL_RECALL * held[-1]).sum()) + 1
    row_bytes = mlp.rows[0, 0].nbytes
    return (down.numel() + up.numel()) * dtype.itemsize + selected / len(y) * row_bytes


def _regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, N) and bias (N,) of the least-squares map x (T, C) -> y (T, N)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    weight = torch.linalg.solve(x.T @ x / len(x) + _ridge(x), x.T @ (y - mean_y) / len(x))
    return weight, mean_y - mean_x @ weight


def _ridge(centred: Tensor) -> Tensor:
    """Enough of the identity to keep a covariance invertible."""
    return 1e-3 * centred.var(0).mean().clamp(min=1e-12) * torch.eye(centred.shape[1])
