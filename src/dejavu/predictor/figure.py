"""The frontier of a pack, drawn: quality over bytes read."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dejavu.artifacts import atomic_write
from dejavu.selection.pack import Pack

# Beyond this rise of perplexity nobody wants to be, and the interesting points would stick together.
LIMIT = 0.5


def frontier(pack: Pack, title: str) -> Figure:
    """Perplexity and KL over the bytes of a token, with the default setting marked."""
    points = [p.measured for p in pack.points if p.measured["ppl_increase"] <= LIMIT]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, key, scale, label in zip(
        figure.subplots(1, 2),
        ("ppl_increase", "kl"),
        (100, 1),
        ("perplexity, % more", "KL to dense, nats"),
        strict=True,
    ):
        axes.plot([m["bytes"] / 1e6 for m in points], [m[key] * scale for m in points], marker="o", markersize=4)
        chosen = pack.points[pack.default].measured
        axes.plot(chosen["bytes"] / 1e6, chosen[key] * scale, "o", color="C3", markersize=8, label="default")
        axes.set(xlabel="MB read per token", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{title}: quality over bytes read")
    return figure


def save_frontier(pack: Pack, title: str, folder: Path) -> list[Path]:
    """Write frontier.png and frontier.svg into a folder; returns them. Raises: ConfigError."""
    figure, files = frontier(pack, title), [folder / f"frontier.{kind}" for kind in ("png", "svg")]
    for path in files:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    return files
