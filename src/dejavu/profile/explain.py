"""Two sentences on each figure, made from this model's numbers."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from math import inf, isnan, nan

HEADINGS = {
    "oracle_density": "How few units are enough",
    "quality": "What choosing by context is worth",
    "hot_and_cold": "Hot and cold units",
    "overlap": "What consecutive tokens share",
    "union": "What a batch needs",
    "similarity": "How slowly hidden states change",
    "norms": "The stream and what is added to it",
    "attention": "Heavy hitters and uniform heads",
}


def explain(name: str, result: dict) -> str:
    """Two sentences of plain English on the figure of that name."""
    return re.sub(r"\bnan\b%?", "unknown", _SENTENCES[name](with_nan(result)))


def with_nan(result: dict) -> dict:
    """The result with nan for the numbers of lists that JSON holds as null, so that it can be reckoned with.

    Perplexities stay as they are: there null is what is too large for a number.
    """
    return {key: value if key == "quality" else _with_nan(value) for key, value in result.items()}


def _with_nan(value):
    if isinstance(value, dict):
        return {key: _with_nan(v) for key, v in value.items()}
    return [nan if v is None else _with_nan(v) for v in value] if isinstance(value, list) else value


def mean(values: Sequence[float]) -> float:
    """Over the values that are known."""
    known = [v for v in values if not isnan(v)]
    return statistics.mean(known) if known else nan


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if not isnan(v)]
    return statistics.median(known) if known else nan


def _oracle(r: dict) -> str:
    mlp, heads, error = r["oracle"]["mlp"][0], r["oracle"]["heads"][0], r["errors"][0]
    first = (
        f"With the best units chosen for each token, {mean(mlp):.1%} of the neurons and {mean(heads):.0%} of the "
        f"heads keep each block's output within a relative error of {error:g}, on average over layers."
    )
    if r["firing"] is None:
        return f"{first} No activation is exactly zero here ({r['activation']}), so any neuron left out costs a little."
    most = max(range(r["layers"]), key=lambda layer: -1 if isnan(mlp[layer]) else mlp[layer])
    return (
        f"{first} {mean(r['firing']['density']):.1%} of the neurons are not zero at all; layer {most} needs the most "
        f"of its neurons, {mlp[most]:.1%}."
    )


def _quality(r: dict) -> str:
    q = r["quality"]
    from_on = {
        part: next((x for x, ppl in q[part]["oracle"] if _much(ppl) <= 1.01 * _much(q["dense"])), 1.0)
        for part in _PARTS
    }
    density, best = q["mlp"]["oracle"][len(q["mlp"]["oracle"]) // 3]
    others = ", ".join(
        f"{name} {_much(dict(map(tuple, q['mlp'][policy]))[density]):,.4g}"
        for policy, name in (("non_contextual", "non-contextual"), ("static", "static"), ("random", "random"))
    )
    return (
        f"Dense perplexity is {_much(q['dense']):.2f}; the oracle is within 1 % of it from {from_on['mlp']:.0%} of the "
        f"neurons on (all heads read), and from {from_on['heads']:.0%} of the heads on (all neurons read). At "
        f"{density:.0%} of the neurons the oracle has {_much(best):,.4g}, and choices that ignore the context have: "
        f"{others}."
    )


def _hot(r: dict) -> str:
    of = _mlp(r)
    return (
        f"Half of all MLP activity comes from the most used {mean(of['half_from']):.1%} of the neurons, on average "
        f"over layers. {mean(of['never']):.1%} were active for no token of this text."
    )


def _overlap(r: dict) -> str:
    of, heads = _mlp(r), r["head_sets"]
    return (
        f"Of a token's active neurons {mean(of['overlap']):.0%} were active for the token before, where independent "
        f"choices would share {mean(of['density']):.1%}. Of its heads it is {mean(heads['overlap']):.0%}, where "
        f"independent choices would share {mean(heads['density']):.0%}."
    )


def _union(r: dict) -> str:
    of, heads = _mlp(r), r["head_sets"]
    size = of["batch_sizes"][-1]
    chance = mean(1 - (1 - d) ** size for d in of["density"])
    return (
        f"A batch reads what any of its tokens needs: one token needs {mean(of['union'][0]):.1%} of the neurons, "
        f"{size} tokens together {mean(of['union'][-1]):.1%} (independent choices: {chance:.1%}). Of the heads one "
        f"token needs {mean(heads['union'][0]):.0%}, and {heads['batch_sizes'][-1]} tokens together "
        f"{mean(heads['union'][-1]):.0%}."
    )


def _similarity(r: dict) -> str:
    cosine = r["states"]["cosine"]
    next_to = [cosine[i][i + 1] for i in range(r["layers"] - 1)]
    least = min(range(len(next_to)), key=lambda i: inf if isnan(next_to[i]) else next_to[i])
    return (
        f"The inputs of neighbouring layers have a cosine similarity of {_median(next_to):.3f} (median over layers), "
        f"those of the first and the last layer {cosine[0][-1]:.3f}. The stream turns most in layer {least} "
        f"({next_to[least]:.3f})."
    )


def _norms(r: dict) -> str:
    a, m = r["states"]["attention"], r["states"]["mlp"]
    return (
        f"Attention adds {_median(a['ratio']):.2f} and the MLP {_median(m['ratio']):.2f} of the stream's norm (median "
        f"over layers). The stream's norm is {a['x_norm'][0]:.3g} before the first layer and {m['x_norm'][-1]:.3g} "
        "before the last MLP."
    )


def _attention(r: dict) -> str:
    heavy, even, top = r["attention"]["heavy"][0], r["attention"]["uniform"][0], r["attention"]["top_tokens"]
    return (
        f"Layer {heavy['layer']}'s head {heavy['head']} is a heavy hitter: {heavy['top_share']:.0%} of its attention "
        f"goes to {top} tokens. Layer {even['layer']}'s head {even['head']} spreads its attention, at "
        f"{even['evenness']:.0%} of the largest possible entropy."
    )


def _much(value: float | None) -> float:
    """A perplexity; JSON has no word for one that is too large for a number."""
    return inf if value is None else value


def _mlp(r: dict) -> dict:
    return r["mlp_sets"] if r["firing"] is None else r["firing"]


_PARTS = ("mlp", "heads")
_SENTENCES: dict[str, Callable[[dict], str]] = {
    "oracle_density": _oracle,
    "quality": _quality,
    "hot_and_cold": _hot,
    "overlap": _overlap,
    "union": _union,
    "similarity": _similarity,
    "norms": _norms,
    "attention": _attention,
}
