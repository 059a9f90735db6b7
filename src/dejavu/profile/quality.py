"""Perplexity over density for every policy: what contextual selection is worth (Figure 1(2) of the paper).

Every token reads its own selection in a masked forward pass (model.hooks.TokenMasks), which is tested to equal sparse
decode steps. The first token of a window reads everything, as the prompt does before decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dejavu.config import ModelConfig, Policy, SelectionConfig
from dejavu.model.decoder import Decoder
from dejavu.model.hooks import TokenMasks
from dejavu.profile.settings import ProfileConfig
from dejavu.selection import ScoreSelector, make_selector

POLICIES: tuple[Policy, ...] = ("oracle", "non_contextual", "static", "random")
Part = Literal["mlp", "heads"]


@dataclass(frozen=True)
class Point:
    """One perplexity to measure: `units` neurons or heads a layer, chosen by `policy`; all of them where it is None."""

    part: Part | None = None
    policy: Policy | None = None
    units: int | None = None

    @property
    def name(self) -> str:
        return "dense" if self.policy is None else f"{self.part} {self.policy} {self.units}"


def points(settings: ProfileConfig, config: ModelConfig) -> list[Point]:
    """What to measure, dense first. Densities that round to the same number of units are one point."""
    out = [Point()]
    for part, total in (("mlp", config.intermediate_size), ("heads", config.num_attention_heads)):
        counts = {math.ceil(round(density * total, 6)) for density in settings.densities} - {total}
        out += [Point(part, policy, units) for policy in POLICIES for units in sorted(counts)]
    return out


def measure(
    point: Point, decoder: Decoder, held: Sequence[list[int]], importance: Sequence[tuple[Tensor, Tensor]], seed: int
) -> float:
    """The perplexity of the held windows.

    Args:
        importance: of heads (H,) and neurons (I,) for each layer, for the static policy.
    """
    selector = None
    if point.policy is not None:
        c = decoder.config
        density = point.units / (c.intermediate_size if point.part == "mlp" else c.num_attention_heads)
        name = "mlp_density" if point.part == "mlp" else "attn_density"
        selection = SelectionConfig(point.policy, seed=seed, **{name: density})
        selector = make_selector(selection, c, decoder.weights, decoder.ops, importance=importance)
    mean = sum(_loss(decoder, ids, selector) for ids in held) / sum(len(ids) - 1 for ids in held)
    return torch.tensor(mean, dtype=torch.float64).exp().item()  # infinite, not an error, where it is too large


@torch.inference_mode()
def _loss(decoder: Decoder, ids: list[int], selector: ScoreSelector | None) -> float:
    """The summed negative log-likelihood of all tokens but the first."""
    hooks = None if selector is None else TokenMasks(selector, dense_prefix=1)
    tokens = torch.tensor(ids)
    logits = decoder.prefill(tokens, decoder.new_cache(1, len(ids)), all_logits=True, hooks=hooks)
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum").item()
