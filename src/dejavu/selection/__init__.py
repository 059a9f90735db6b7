"""Selections: which heads and neurons a decode step reads, and the policies that choose them.

`predictor` reads a sparsity pack (selection.pack). `make_selector` builds those that need no training:

- `oracle`: computes everything first and keeps the units with the largest output norm. The upper bound; not fast.
- `static`: one fixed set for all tokens, the units that matter most on a calibration text.
- `non_contextual`: the oracle's choice for the token's embedding alone, without its context.
- `random`: a new random set for each token.
- `nearest`: neurons by approximate nearest-neighbour search over their input rows; heads are all read.
- `signs`: neurons whose pre-activation is largest when of each input weight only the sign is looked at; heads are all
  read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dejavu.checkpoint.layout import Weights
from dejavu.config import ModelConfig, SelectionConfig
from dejavu.errors import ConfigError
from dejavu.kernels.base import Backend
from dejavu.selection.selector import Cut, ScoreSelector, Selector

__all__ = ["Cut", "ScoreSelector", "Selector", "make_selector"]


def make_selector(
    selection: SelectionConfig,
    config: ModelConfig,
    weights: Weights,
    ops: Backend,
    *,
    importance: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> ScoreSelector:
    """Build the selector of a policy for one model.

    Args:
        importance: for "static": for each layer how much each head (H,) and each neuron (I,) matters, float32; see
            dejavu.selection.oracle.Importance.
    Raises: ConfigError where the policy cannot serve this model or these densities.
    """
    totals = config.num_attention_heads, config.intermediate_size
    cuts = [
        tuple(Cut(k) if k < total else None for k, total in zip(selection.counts(layer, config), totals, strict=True))
        for layer in range(config.num_hidden_layers)
    ]
    sparse_heads = any(heads is not None for heads, _ in cuts)
    if selection.policy in ("nearest", "signs") and sparse_heads:
        raise ConfigError(f"policy {selection.policy} selects neurons only: attn_density must be 1")
    if selection.policy == "oracle" and selection.kv == "lazy" and sparse_heads:
        raise ConfigError(
            "the oracle computes every head before it chooses, so keys and values are not lazy: use kv full"
        )
    if selection.policy == "static":
        from dejavu.selection.fixed import StaticSelector

        if importance is None:
            raise ConfigError("policy static needs a calibration text to find the units that matter most")
        return StaticSelector(cuts, ops, importance, weights.embed.device)
    if selection.policy == "random":
        from dejavu.selection.fixed import RandomSelector

        return RandomSelector(cuts, ops, totals, selection.seed, weights.embed.device)
    if selection.policy in ("oracle", "non_contextual"):
        from dejavu.selection import oracle

        kind = oracle.OracleSelector if selection.policy == "oracle" else oracle.NonContextualSelector
        return kind(cuts, config, weights, ops)
    if selection.policy == "signs":
        from dejavu.selection.signs import SignsSelector

        return SignsSelector(cuts, weights, ops)
    from dejavu.selection.nearest import NearestSelector

    return NearestSelector(cuts, config, weights, ops)
