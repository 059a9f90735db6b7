"""A run of benchmarks to look at: the table, and figures beside the physical limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def tables(fields: dict[str, Any], title: str) -> list[Table]:
    """Times; bytes by part; times by op where they are known; ratios to peers where there are any."""
    from rich.table import Table

    results = fields["results"]
    ours = {name: r for name, r in results.items() if "bytes_per_token" in r}
    peers = {name: r for name, r in results.items() if "peer" in r and "died" not in r}

    def table(title: str, *columns: str) -> Table:
        out = Table(title=title)
        for column in columns:
            out.add_column(column, justify="right" if column else "left", no_wrap=True)
        return out

    limit = fields["read_bandwidth_bytes_per_s"]
    times = table(
        f"{title}; this machine reads {limit / 1e9:.1f} GB/s",
        *("", "ms p20", "p50", "p80", "tok/s", "prompt ms"),
        *("GB/step", "of bandwidth", "selecting", "MLP", "heads", "whole"),
    )
    for name, r in results.items():
        if "died" in r:
            times.add_row(name, r["died"])
            continue
        cells = [f"{r[p]:.3g}" for p in ("p20_ms", "p50_ms", "p80_ms")] + [f"{r['tok_per_s']:.2f}"]
        cells.append(f"{r['prefill_p50_ms']:.3g}")
        if name in ours:
            cells.append(f"{sum(r['bytes_per_token'].values()) / 1e9:.3f}")
            cells += [f"{r[k]:.1%}" for k in ("bandwidth_share", "predictor_share", "mlp_density", "attn_density")]
            # Layers whose MLP, whose heads selections did not pay for.
            cells.append("/".join(str(len(layers)) for layers in reversed(r["whole"])))
        times.add_row(name, *cells, *("-" for _ in range(11 - len(cells))))
    out = [times]
    if ours:
        parts = list(next(iter(ours.values()))["bytes_per_token"])
        read = table("MB read by a step", "", *parts)
        for name, r in ours.items():
            read.add_row(name, *(f"{r['bytes_per_token'][part] / 1e6:.1f}" for part in parts))
        out.append(read)
    if timed := {name: r["op_ms"] for name, r in ours.items() if r["op_ms"]}:
        ops = list(dict.fromkeys(op for ms in timed.values() for op in ms))
        where = table("ms of a step by op", "", *ops)
        for name, ms in timed.items():
            where.add_row(name, *(f"{ms[op]:.2f}" if op in ms else "-" for op in ops))
        out.append(where)
    if ours and peers:
        ratios = table("times as fast as", "", *peers)
        for name, r in ours.items():
            if r["times_peer"]:
                ratios.add_row(name, *(f"{r['times_peer'][p]:.2f}" if p in r["times_peer"] else "-" for p in peers))
        out.append(ratios)
    return out


def figures(fields: dict[str, Any], title: str) -> dict[str, Figure]:
    """By name: "times" always; "density" and "batch" where ours ran at two or more of them."""
    limit = fields["read_bandwidth_bytes_per_s"]
    results = {name: r for name, r in fields["results"].items() if "died" not in r}
    made = {"times": _bars(results, title)}
    sparse = [r for r in results.values() if r.get("mode") == "sparse"]
    for name, key, label in (("density", "mlp_density", "MLP density measured"), ("batch", "batch", "batch")):
        runs = sparse if name == "density" else [r for r in results.values() if "mode" in r]
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for r in runs:
            floor = sum(r["bytes_per_token"].values()) / limit * 1e3
            lines.setdefault(_line(r, name), []).append((r[key], r["p50_ms"], floor))
        lines = {label: sorted(points) for label, points in lines.items() if len({p[0] for p in points}) > 1}
        if lines:
            made[name] = _lines(lines, label, title)
    return made


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG, whole or not at all; returns the files. Raises: ConfigError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            files.append(folder / f"{name}.{kind}")
            with atomic_write(files[-1], "wb") as file:
                figure.savefig(file, format=kind, dpi=150)
    return files


def _line(r: dict[str, Any], over: str) -> str:
    """What the points of one line share."""
    parts = [r["mode"], r["policy"], r["kv"], r["weights_format"], f"prompt {r['prompt']}"]
    if over == "density":
        parts.append(f"batch {r['batch']}, heads {r['asked_attn_density']}")
    elif r["mode"] == "sparse":
        parts += ["always"] if r["crossover"] is False else []
        parts.append(f"MLP {r['asked_mlp_density']}, heads {r['asked_attn_density']}")
    return " ".join(str(part) for part in parts if part is not None)


def _lines(lines: dict[str, list[tuple[float, float, float]]], label: str, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        x, ms, floor = zip(*points, strict=True)
        (drawn,) = axes.plot(x, ms, marker="o", label=name)
        axes.plot(x, floor, linestyle="--", color=drawn.get_color(), label="limit: bytes over bandwidth")
    axes.set(xlabel=label, ylabel="ms for a step, median", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


def _bars(results: dict[str, Any], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.35 * len(results)), layout="constrained")
    axes = figure.subplots()
    names, rs = list(results), list(results.values())
    axes.barh(names, [r["p50_ms"] for r in rs], color=["C7" if "peer" in r else "C0" for r in rs])
    axes.invert_yaxis()
    axes.set(xlabel="ms for a step, median", title=title)
    return figure
