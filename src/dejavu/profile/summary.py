"""From sums to numbers: what profile.json holds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.profile.activity import Activity
from dejavu.profile.attention import TOP_TOKENS, Sentence
from dejavu.profile.quality import POLICIES, points
from dejavu.profile.settings import ProfileConfig
from dejavu.profile.state import SCHEMA_VERSION, State
from dejavu.profile.states import BLOCKS

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# Points of a curve over sorted units: enough for any figure.
CURVE = 201
EXAMPLES = 2  # heads of each kind whose attention is drawn


def summarise(
    state: State, config: ModelConfig, settings: ProfileConfig, sentence: Sentence, sources: list[str]
) -> dict:
    """Every number of a profile, as plain JSON values; docs/profile.md says what each one is."""
    s = state.statistics
    return {
        "schema_version": SCHEMA_VERSION,
        **state.identity,
        "model_type": config.model_type,
        "activation": config.activation,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "neurons": config.intermediate_size,
        "text": {"sources": sources, "sha256": state.digest, "watched_tokens": state.windows * settings.window},
        "seconds": round(state.seconds, 1),
        "oracle": {
            "mlp": _plain(s.oracle_neurons.density(config.intermediate_size)),
            "heads": _plain(s.oracle_heads.density(config.num_attention_heads)),
        },
        "firing": None if s.fired is None else _activity(s.fired),
        "mlp_sets": _activity(s.neuron_sets),
        "head_sets": _activity(s.head_sets),
        "states": {"cosine": _plain(s.similarity.mean()), **_norms(s.norms.means())},
        "attention": _attention(sentence),
        "quality": _quality(state, config, settings) if state.perplexity else None,
    }


def _activity(activity: Activity) -> dict:
    frequency = activity.frequency()
    at = torch.linspace(0, frequency.shape[1] - 1, min(CURVE, frequency.shape[1])).round().long()
    union = activity.union(BATCH_SIZES)
    known = [i for i in range(len(BATCH_SIZES)) if not union[i].isnan().any()]
    return {
        "density": _plain(activity.density()),
        "overlap": _plain(activity.overlap()),
        "frequency": _plain(frequency[:, at]),
        "never": _plain((frequency == 0).double().mean(1)),
        "half_from": _plain(_half(frequency)),
        "batch_sizes": [BATCH_SIZES[i] for i in known],
        "union": _plain(union[known]),
    }


def _half(frequency: Tensor) -> Tensor:
    """(L,): the smallest fraction of units from which half of all activity comes. frequency: (L, N), falling."""
    sums = frequency.cumsum(1)
    return ((sums < sums[:, -1:] / 2).sum(1) + 1).double() / frequency.shape[1]


def _norms(means: Tensor) -> dict:
    names = ("x_norm", "f_norm", "ratio", "cosine")
    return {block: {name: _plain(means[:, at, i]) for i, name in enumerate(names)} for at, block in enumerate(BLOCKS)}


def _attention(sentence: Sentence) -> dict:
    def examples(heads: list[tuple[int, int]]) -> list[dict]:
        return [
            {
                "layer": layer,
                "head": head,
                "top_share": _plain(sentence.top_share[layer, head]),
                "evenness": _plain(sentence.evenness[layer, head]),
                "map": _plain(sentence.maps[layer, head]),
            }
            for layer, head in heads
        ]

    return {
        "tokens": sentence.tokens,
        "top_tokens": TOP_TOKENS,
        "top_share": _plain(sentence.top_share),
        "evenness": _plain(sentence.evenness),
        "heavy": examples(sentence.heavy(EXAMPLES)),
        "uniform": examples(sentence.uniform(EXAMPLES)),
    }


def _quality(state: State, config: ModelConfig, settings: ProfileConfig) -> dict:
    """Perplexities; each curve is a list of [density, perplexity] that ends with the dense model."""
    dense, totals = state.perplexity["dense"], {"mlp": config.intermediate_size, "heads": config.num_attention_heads}
    curves = {part: {policy: [] for policy in POLICIES} for part in totals}
    for point in points(settings, config)[1:]:
        curves[point.part][point.policy].append([point.units / totals[point.part], state.perplexity[point.name]])
    for curve in (c for part in curves.values() for c in part.values()):
        curve.append([1.0, dense])
    return {
        "dense": _significant(dense),
        **{part: {p: _rounded(curve) for p, curve in by.items()} for part, by in curves.items()},
    }


def _plain(tensor: Tensor) -> list | float:
    return _rounded(tensor.tolist())


def _rounded(value: list | float) -> list | float:
    return [_rounded(v) for v in value] if isinstance(value, list) else _significant(value)


def _significant(value: float) -> float | None:
    """Six digits; None for what is no number, which JSON does not know."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
