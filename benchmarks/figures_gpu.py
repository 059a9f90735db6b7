"""The figures of decode_gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw what was measured: ms per token by shape, kernel latency over density, ms per step over the batch."""
    out.mkdir(parents=True, exist_ok=True)
    steps = [r for r in rows if r["prompt"] and r["batch"] == 1]
    if steps:
        first = min(r["prompt"] for r in steps)
        at = [r for r in steps if r["prompt"] == first]
        names, modes = (list(dict.fromkeys(r[key] for r in at)) for key in ("shape", "mode"))
        figure, axes = plt.subplots(figsize=(9, 4))
        width = 0.8 / len(modes)
        for i, mode in enumerate(modes):
            bars = [(names.index(r["shape"]) + i * width, r["p50_ms"]) for r in at if r["mode"] == mode]
            axes.bar(*zip(*bars, strict=True), width=width, label=mode)
        axes.set_xticks([n + 0.4 - width / 2 for n in range(len(names))], names)
        _save(figure, axes, out / "decode_gpu.png", f"ms per token, batch 1, prompt {first}", "log")
    kernels = [r for r in rows if not r["prompt"]]
    if kernels:
        figure, axes = plt.subplots(figsize=(6, 4))
        for op in dict.fromkeys(r["mode"] for r in kernels):
            points = sorted((r["density"], r["p50_ms"] * 1e3) for r in kernels if r["mode"] == op)
            axes.plot(*zip(*points, strict=True), marker="o", label=op)
        axes.set_xlabel("density")
        _save(figure, axes, out / "kernels_gpu.png", f"MLP of {kernels[0]['shape']}, microseconds", "log")
    batches = [r for r in rows if r["prompt"] == 128 and r["mode"] in ("dense", "sparse")]
    batches = [r for r in batches if r["shape"] in {b["shape"] for b in batches if b["batch"] > 1}]
    if batches:
        figure, axes = plt.subplots(figsize=(6, 4))
        for mode in ("dense", "sparse"):
            points = sorted((r["batch"], r["p50_ms"]) for r in batches if r["mode"] == mode)
            axes.plot(*zip(*points, strict=True), marker="o", label=mode)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        _save(figure, axes, out / "batches_gpu.png", f"{batches[0]['shape']}, ms per step", "linear")


def _save(figure, axes, path: Path, title: str, scale: str) -> None:
    axes.set_title(title)
    axes.set_yscale(scale)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
