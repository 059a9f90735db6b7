"""The figures of a profile, drawn from the numbers of profile.json and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from dejavu.profile.explain import mean, with_nan

STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "dejavu",  # the same numbers give the same file
    "svg.fonttype": "path",
}
POLICY_NAMES = {
    "oracle": "oracle (contextual)",
    "non_contextual": "non-contextual",
    "static": "static",
    "random": "random",
}


def draw(result: dict) -> dict[str, Figure]:
    """All figures that the numbers allow, by name, in the order of the page."""
    with rc_context(STYLE):
        known = with_nan(result)
        return {name: figure for name, make in FIGURES.items() if (figure := make(known)) is not None}


def render(figure: Figure, kind: str) -> bytes:
    """A figure as "png" or "svg", without a date in it."""
    file = BytesIO()
    with rc_context(STYLE):
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def oracle(r: dict) -> Figure:
    figure, axes = _panels(2)
    for axis, part, title in zip(axes, ("mlp", "heads"), ("MLP neurons", "Attention heads"), strict=True):
        for error, density in sorted(zip(r["errors"], r["oracle"][part], strict=True)):
            axis.plot(density, marker="o", ms=3, label=f"oracle, error {error:g}")
        if part == "mlp" and r["firing"] is not None:
            axis.plot(r["firing"]["density"], color="black", ls="--", label="not zero")
        _layers(axis, title, "density (share of units kept)")
        _percent(axis.yaxis)
        axis.set_ylim(0)
        axis.legend()
    return figure


def quality(r: dict) -> Figure | None:
    if r["quality"] is None or r["quality"]["dense"] is None:
        return None
    figure, axes = _panels(2)
    for axis, part, title in zip(axes, ("mlp", "heads"), ("MLP neurons", "Attention heads"), strict=True):
        for policy, curve in r["quality"][part].items():
            axis.plot(*zip(*curve, strict=True), marker="o", ms=3, label=POLICY_NAMES[policy])
        axis.axhline(r["quality"]["dense"], color="black", ls="--", lw=1, label="dense")
        axis.set(title=title, xlabel="density (% of units kept)", ylabel="perplexity", xscale="log", yscale="log")
        shown = sorted({density for curve in r["quality"][part].values() for density, _ in curve})
        axis.set_xticks(shown, [f"{density:.3g}" for density in (100 * d for d in shown)])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.legend()
    return figure


def hot_and_cold(r: dict) -> Figure:
    figure, (axis, other) = _panels(2)
    for of, where, title in ((_mlp(r), axis, f"MLP neurons, {_meaning(r)}"), (r["head_sets"], other, _set(r, "Heads"))):
        for layer, curve in enumerate(of["frequency"]):
            share = [(i + 1) / len(curve) for i in range(len(curve))]
            where.plot(share, curve, color=_color(layer, r), lw=1.2, label=_label(layer, r))
        where.set(title=title, xlabel="units, from the most used one on", ylabel="share of tokens")
        _percent(where.xaxis)
        _percent(where.yaxis)
        where.legend(title="layer", ncol=2)
    return figure


def overlap(r: dict) -> Figure:
    figure, axes = _panels(2)
    titles = (f"MLP neurons, {_meaning(r)}", _set(r, "Heads"))
    for axis, of, title in zip(axes, (_mlp(r), r["head_sets"]), titles, strict=True):
        axis.plot(of["overlap"], marker="o", ms=3, label="active for the token before, too")
        axis.plot(of["density"], color="black", ls="--", label="density: if tokens shared by chance")
        _layers(axis, title, "share of a token's active units")
        _percent(axis.yaxis)
        axis.set_ylim(0, 1.02)
        axis.legend()
    return figure


def union(r: dict) -> Figure:
    figure, axes = _panels(2)
    titles = (f"MLP neurons, {_meaning(r)}", _set(r, "Heads"))
    for axis, of, title in zip(axes, (_mlp(r), r["head_sets"]), titles, strict=True):
        for layer in range(r["layers"]):
            curve = [row[layer] for row in of["union"]]
            axis.plot(of["batch_sizes"], curve, color=_color(layer, r), lw=1.2, label=_label(layer, r))
        chance = [mean(1 - (1 - density) ** size for density in of["density"]) for size in of["batch_sizes"]]
        axis.plot(of["batch_sizes"], chance, color="black", ls="--", lw=1, label="by chance, mean")
        axis.set(title=title, xlabel="batch size (random tokens together)", ylabel="union density", ylim=(0, 1.02))
        if chance[0] > 0:  # matplotlib scales by what it can draw
            axis.set_xscale("log", base=2)
        axis.set_xticks(of["batch_sizes"], [str(size) for size in of["batch_sizes"]])
        _percent(axis.yaxis)
        axis.legend(title="layer", ncol=2)
    return figure


def similarity(r: dict) -> Figure | None:
    if r["layers"] < 2:
        return None
    figure, (left, right) = _panels(2)
    distances = range(1, r["layers"])
    rows = [_at_distance(r["states"]["cosine"], d) for d in distances]
    left.plot(distances, [mean(row) for row in rows], marker="o", ms=3, label="mean over layers")
    left.fill_between(distances, [min(row) for row in rows], [max(row) for row in rows], alpha=0.2, label="range")
    left.set(title="Inputs of two layers", xlabel="distance (layers)", ylabel="cosine similarity", ylim=(None, 1.01))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    right.plot(rows[0], marker="o", ms=3, label="this layer's input, the next one's")
    for block in ("attention", "mlp"):
        right.plot(r["states"][block]["cosine"], marker="o", ms=3, label=f"before and after the {_block(block)}")
    _layers(right, "Next to each other", "cosine similarity")
    right.set_ylim(None, 1.01)
    right.legend()
    return figure


def norms(r: dict) -> Figure:
    figure, axes = _panels(2)
    for axis, block in zip(axes, ("attention", "mlp"), strict=True):
        of = r["states"][block]
        axis.plot(of["x_norm"], marker="o", ms=3, label="||X||, the stream before")
        axis.plot(of["f_norm"], marker="o", ms=3, label="||F(X)||, what the block adds")
        _layers(axis, f"Around the {_block(block)}", "mean norm")
        if any(norm > 0 for norm in of["x_norm"] + of["f_norm"]):  # matplotlib scales by what it can draw
            axis.set_yscale("log")
        ratio = axis.twinx()
        ratio.plot(of["ratio"], color="gray", ls=":", label="mean of ||F(X)|| / ||X|| (right)")
        ratio.set_ylim(0)
        ratio.set_ylabel("ratio")
        ratio.grid(False)
        axis.legend(*(a + b for a, b in zip(_handles(axis), _handles(ratio), strict=True)))
    return figure


def attention(r: dict) -> Figure:
    examples = [("heavy hitter", e) for e in r["attention"]["heavy"]]
    examples += [("uniform", e) for e in r["attention"]["uniform"]]
    rows = -(-len(examples) // 2)
    figure = Figure(figsize=(9, 4.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    tokens = [token.strip() or "·" for token in r["attention"]["tokens"]]
    for axis, (kind, example) in zip(axes, examples, strict=False):
        image = axis.imshow(example["map"], cmap="Blues", vmin=0)
        axis.set_title(f"{kind}: layer {example['layer']}, head {example['head']}")
        # A dollar sign would start mathematics.
        labels = [token.replace("$", r"\$") for token in tokens]
        axis.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=6)
        axis.set_yticks(range(len(tokens)), labels, fontsize=6)
        axis.set(xlabel="token looked at", ylabel="token that looks")
        axis.grid(False)
        figure.colorbar(image, ax=axis, shrink=0.7, label="attention")
    for axis in list(axes)[len(examples) :]:
        axis.remove()
    return figure


FIGURES: dict[str, Callable[[dict], Figure | None]] = {
    "oracle_density": oracle,
    "quality": quality,
    "hot_and_cold": hot_and_cold,
    "overlap": overlap,
    "union": union,
    "similarity": similarity,
    "norms": norms,
    "attention": attention,
}


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count))


def _layers(axis: Axes, title: str, ylabel: str) -> None:
    axis.set(title=title, xlabel="layer", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _percent(axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=None))


def _color(layer: int, r: dict):
    return colormaps["viridis"](0.9 * layer / max(1, r["layers"] - 1))


def _label(layer: int, r: dict) -> str | None:
    """A deep model names only some of its layers in a legend."""
    step = -(-r["layers"] // 8)
    return str(layer) if layer % step == 0 or layer == r["layers"] - 1 else None


def _handles(axis: Axes) -> tuple[list, list]:
    return axis.get_legend_handles_labels()


def _mlp(r: dict) -> dict:
    return r["mlp_sets"] if r["firing"] is None else r["firing"]


def _meaning(r: dict) -> str:
    return f"oracle sets at error {r['errors'][0]:g}" if r["firing"] is None else "not zero"


def _set(r: dict, units: str) -> str:
    return f"{units}, oracle sets at error {r['errors'][0]:g}"


def _block(name: str) -> str:
    return "MLP" if name == "mlp" else name


def _at_distance(cosine: list[list[float]], distance: int) -> list[float]:
    return [row[i + distance] for i, row in enumerate(cosine) if i + distance < len(row)]
