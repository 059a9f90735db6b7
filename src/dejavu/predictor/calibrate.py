"""Cuts for every block within a bound on quality.

Each block has options: cuts of its predictor's scores at rising densities. What an option loses by itself is known
from the collected norms; what a loss in this block does to the model is measured once per block, through masked forward
passes. A price on bytes then picks an option for every block, heads and neurons alike, by effect per byte saved; a row
of prices gives the frontier, every point of which is measured through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Weights
from dejavu.config import ModelConfig
from dejavu.kernels import reference
from dejavu.kernels.base import Backend
from dejavu.model.decoder import Decoder
from dejavu.model.hooks import TokenMasks
from dejavu.predictor.train import Data
from dejavu.selection.block import HEADS, NEURONS, Block
from dejavu.selection.pack import Point
from dejavu.selection.predictor import Lookahead, Predictor, PredictorSelector
from dejavu.selection.selector import Cut

DENSITIES = tuple(np.geomspace(0.002, 0.9, 40))
# An option's capacity: what all but one token in a thousand need, and a bit.
CAPACITY_QUANTILE, CAPACITY_SLACK = 0.999, 1.05
# The option at which a block's effect on the model is measured loses about this share of the block's squared norm.
PROBE_LOSS = 0.02
# Nats per byte: all prices that could matter lie between, and are found to a millionth.
PRICES, PRICE_HALVINGS = (1e-16, 1.0), 26
# Of the calibration windows, for the probes: they only weigh blocks against each other.
PROBE_SHARE = 0.25


@dataclass(frozen=True)
class Option:
    """One cut of a block, None: read all; and per token: the density, the squared norm lost, the bytes read."""

    cut: Cut | None
    density: float
    loss: float
    bytes: float
    recall: float  # share of the active units that are kept
    precision: float  # share of the kept units that are active


def block_options(block: Block, predictor: Predictor, data: Data, weights: Weights) -> list[Option]:
    """The options of a block, cheapest first; the last reads all."""
    y, norms = data.judge()
    scores, square, active = predictor.scores(reference.linear, y), norms.pow(2), norms > 0
    tokens, units = scores.shape
    layer = weights.layers[block.layer]
    if block.part == HEADS:
        r = layer.attn.heads_per_group
        # Query and output rows of a head; the keys and values of its group are as much, and read once.
        unit = out = 2 * layer.attn.blocks[0, 0].nbytes
        candidates = [k / units for k in range(1, units)]
    else:
        unit = layer.mlp.rows[0].nbytes
        out = unit - layer.mlp.rows[0, 0].nbytes  # read only where the neuron is active
        candidates = list(DENSITIES)
    options = []
    ordered, order = scores.flatten().sort(descending=True)
    held, hits = square.flatten()[order].double().cumsum(0), active.flatten()[order].cumsum(0)
    for density in candidates:
        threshold = ordered[max(0, round(density * len(order)) - 1)].item()
        chosen = scores >= threshold
        counts = chosen.sum(1)
        k = min(units, max(1, int(CAPACITY_SLACK * counts.float().quantile(CAPACITY_QUANTILE).ceil().item())))
        # The few tokens that the capacity cuts count as if it did not.
        kept = int(counts.sum())
        hit = hits[kept - 1].item()
        if block.part == HEADS:
            read = (kept + chosen.view(tokens, -1, r).any(2).sum().item()) * unit
        else:
            read = kept * (unit - out) + hit * out
        options.append(
            Option(
                Cut(k, threshold),
                kept / len(order),
                (held[-1] - held[kept - 1]).item() / tokens,
                read / tokens + predictor.nbytes,
                hit / max(1, active.sum().item()),
                hit / max(1, kept),
            )
        )
    share = active.float().mean().item()
    everything = layer.attn.blocks.nbytes if block.part == HEADS else units * (unit - out + share * out)
    options.append(Option(None, 1.0, 0.0, everything, 1.0, share))
    return [o for o in options if o.bytes < everything or o.cut is None]


@dataclass
class Measured:
    """A setting's effect on the text, against the dense model. Losses in nats per token."""

    loss: float
    dense_loss: float
    kl: float
    agreement: float  # share of tokens whose likeliest next token is the dense model's
    mlp_density: float
    attn_density: float

    @property
    def ppl_increase(self) -> float:
        return float(np.expm1(self.loss - self.dense_loss))


class Judge:
    """Measures settings on fixed windows of tokens, with every token's own selection.

    Keeps the dense model's log-probabilities in half precision: 2 * V bytes a token.
    """

    def __init__(self, decoder: Decoder, windows: Sequence[Sequence[int]]):
        self._decoder = decoder
        self._windows = [torch.tensor(w) for w in windows]
        self._dense = [self._log_probs(w).half() for w in self._windows]
        self.dense_loss = self._mean_loss(self._dense)

    def divergence(self, selector: PredictorSelector, share: float) -> float:
        """The `kl` of `measure`, over the first share of the windows."""
        some = max(1, int(len(self._windows) * share))
        total = 0.0
        for window, dense in zip(self._windows[:some], self._dense[:some], strict=True):
            total += _divergence(dense.float(), self._log_probs(window, TokenMasks(selector)))
        return total / sum(len(w) for w in self._windows[:some])

    def measure(self, selector: PredictorSelector) -> Measured:
        """One forward pass over all windows."""
        masks = TokenMasks(selector)
        kl = agree = loss = 0.0
        for window, half in zip(self._windows, self._dense, strict=True):
            ours, dense = self._log_probs(window, masks), half.float()
            kl += _divergence(dense, ours)
            agree += (ours.argmax(1) == dense.argmax(1)).sum().item()
            loss += F.nll_loss(ours[:-1], window[1:], reduction="sum").item()
        tokens = sum(len(w) for w in self._windows)
        c = self._decoder.config
        totals = torch.tensor([c.num_attention_heads, c.intermediate_size]) * c.num_hidden_layers * masks.tokens
        attn, mlp = (masks.kept.sum(0) / totals).tolist()
        targets = tokens - len(self._windows)
        return Measured(loss / targets, self.dense_loss, kl / tokens, agree / tokens, mlp, attn)

    def _log_probs(self, window: Tensor, masks: TokenMasks | None = None) -> Tensor:
        cache = self._decoder.new_cache(1, len(window))
        return self._decoder.prefill(window, cache, all_logits=True, hooks=masks).cpu().log_softmax(-1)

    def _mean_loss(self, log_probs: Sequence[Tensor]) -> float:
        total = sum(
            F.nll_loss(p[:-1].float(), w[1:], reduction="sum").item()
            for p, w in zip(log_probs, self._windows, strict=True)
        )
        return total / sum(len(w) - 1 for w in self._windows)


def _divergence(dense: Tensor, ours: Tensor) -> float:
    """Kullback-Leibler divergence, summed over tokens, of log-probabilities (T, V)."""
    return (dense.exp() * (dense - ours)).sum().item()


class Search:
    """Chooses options for all blocks at a price.

    Args:
        options: of each block that has a predictor.
        blocks: of the model, in order.
    """

    def __init__(self, options: dict[Block, list[Option]], blocks: Sequence[Block]):
        self._options, self._blocks = options, blocks
        self._sensitivity: dict[Block, float] = {}

    def probe(self, block: Block, judge: Judge, select: Callable) -> float:
        """Divergence per squared norm that this block loses, measured with all others dense."""
        options = self._options[block]
        sparse = [o for o in options if o.cut is not None and o.loss > 0]
        if not sparse:
            return 0.0
        most = max(o.loss for o in sparse)
        option = min(sparse, key=lambda o: abs(o.loss - PROBE_LOSS * most))
        return max(judge.divergence(select(self.cuts({block: option})), PROBE_SHARE), 1e-9) / option.loss

    def set_sensitivity(self, block: Block, value: float) -> None:
        self._sensitivity[block] = value

    def choose(self, price: float) -> dict[Block, Option]:
        """For every block the option of least divergence + price * bytes. price: nats per byte."""
        return {
            block: min(options, key=lambda o: self._sensitivity[block] * o.loss + price * o.bytes)
            for block, options in self._options.items()
        }

    def cuts(self, chosen: dict[Block, Option]) -> list[Cut | None]:
        return [chosen[b].cut if b in chosen else None for b in self._blocks]

    def price(self, divergence: float) -> float:
        """The highest price at which the blocks' divergences are expected to add up to no more than this."""
        low, high = PRICES
        for _ in range(PRICE_HALVINGS):
            middle = float(np.sqrt(low * high))
            expected = sum(self._sensitivity[b] * o.loss for b, o in self.choose(middle).items())
            low, high = (middle, high) if expected <= divergence else (low, middle)
        return low


def make_select(
    predictors: dict[Block, Predictor], lookahead: Lookahead, config: ModelConfig, ops: Backend
) -> Callable[[Sequence[Cut | None]], PredictorSelector]:
    """A function from cuts by block to a selector."""

    def select(cuts: Sequence[Cut | None]) -> PredictorSelector:
        return PredictorSelector(predictors, lookahead, Block.pairs(cuts), config, ops)

    return select


def as_point(cuts: Sequence[Cut | None], measured: Measured, chosen: dict[Block, Option], rest_bytes: float) -> Point:
    """A point of a pack. rest_bytes: what every step reads besides the blocks that have predictors."""
    neurons = [o for b, o in chosen.items() if b.part == NEURONS]
    return Point(
        tuple(cuts),
        {
            "ppl_increase": measured.ppl_increase,
            "kl": measured.kl,
            "agreement": measured.agreement,
            "mlp_density": measured.mlp_density,
            "attn_density": measured.attn_density,
            "mlp_recall": float(np.mean([o.recall for o in neurons])) if neurons else 1.0,
            "mlp_precision": float(np.mean([o.precision for o in neurons])) if neurons else 1.0,
            "bytes": rest_bytes + sum(o.bytes for o in chosen.values()),
        },
    )
