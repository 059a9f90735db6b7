"""An evaluation to look at: tables, and quality over bytes read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Of the metrics of a task, the first of these stands for it in the figure, or else its own first.
MAIN = ("token_perplexity", "word_perplexity", "perplexity", "acc", "acc_norm", "exact_match", "f1", "mcc")


def tables(result: dict[str, Any]) -> list[Table]:
    """Scores with standard errors and paired differences; closeness to the reference; what was read, and its speed."""
    from rich.table import Table

    settings, reference = list(result["decode"]), result["reference"]
    others = [s for s in settings if s != reference]
    scores = Table(title=_title(result))
    for name in ("task", "metric", "n"):
        scores.add_column(name, justify="right" if name == "n" else "left")
    for setting in settings:
        scores.add_column(setting, justify="right")
        if setting != reference:
            scores.add_column("difference [95 %]", justify="right")
    for task, r in result["tasks"].items():
        for i, (metric, row) in enumerate(r["metrics"].items()):
            cells = []
            for setting in settings:
                cells.append(_value(metric, row[setting]))
                if setting != reference:
                    cells.append(_difference(metric, row[setting]))
            scores.add_row("" if i else task, metric, "" if i else str(r["documents"]), *cells)
    out = [scores]
    if others:
        close = Table(title=f"Of the tokens scored, against {reference}")
        close.add_column("task")
        for setting in others:
            close.add_column(f"{setting}: same choice", justify="right")
            close.add_column("KL, nats", justify="right")
        for task, r in result["tasks"].items():
            cells = []
            for setting in others:
                to = r["to_reference"][setting]
                cells += ["-", "-"] if to["kl"] is None else [f"{to['agreement']:.2%}", f"{to['kl']:.4f}"]
            close.add_row(task, *cells)
        out.append(close)
    speed = Table(title="Reading and decoding")
    for name in ("setting", "MLP read", "heads read", "MLP recall", "MB/token", "ms/token", f"times {reference}"):
        speed.add_column(name, justify="left" if name == "setting" else "right")
    base = result["decode"][reference]["ms_per_token"]
    for setting in settings:
        reads, decode = result["reads"][setting], result["decode"][setting]
        cells = [_mean(reads[key]) for key in ("mlp", "heads", "mlp_recall")]
        size, ms = decode["bytes_per_token"], decode["ms_per_token"]
        cells += ["-" if size is None else f"{size / 1e6:.1f}", "-" if ms is None else f"{ms:.2f}"]
        cells.append("-" if not ms or not base else f"{base / ms:.2f}")
        speed.add_row(setting, *cells)
    out.append(speed)
    return out if settings == [reference] else [*out, _by_layer(result)]


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know, a sentence each."""
    ways = {
        "steps": "Every token was scored by real decode steps",
        "masked": "Tokens were scored all at once, each under its own selection (tested to equal decode steps)",
    }
    rows = f", {result['batch']} rows together" if result["batch"] > 1 else ""
    out = [ways[result["path"]] + rows + "; only the first token of a sequence read everything."]
    if result["perplexity"]:
        out.append(f"Perplexity: {result['perplexity']}")
    for task, r in result["tasks"].items():
        if r.get("truncated"):
            out.append(f"{task}: {r['truncated']} requests were longer than the context and lost their beginning.")
        if r.get("empty"):
            out.append(f"{task}: {r['empty']} documents are empty and were left out.")
    return out


def figure(result: dict[str, Any]) -> Figure | None:
    """A panel for each task: its main metric over the bytes that a token reads, a point for each setting.

    None where no task has a metric.
    """
    from matplotlib.figure import Figure

    metrics = {task: r["metrics"] for task, r in result["tasks"].items() if r["metrics"]}
    tasks = {task: next(m for m in (*MAIN, *known) if m in known) for task, known in metrics.items()}
    if not tasks:
        return None
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    drawn = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.6), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flat
    for ax, (task, metric) in zip(axes, tasks.items(), strict=False):
        for i, (setting, decode) in enumerate(result["decode"].items()):
            row = result["tasks"][task]["metrics"][metric][setting]
            size = decode["bytes_per_token"]
            if size is None or row["value"] is None:
                continue
            # Whoever wants to see whether two settings differ looks at the paired interval, not at two errors.
            error = _paired_error(row)
            ax.errorbar(size / 1e6, row["value"], yerr=error, fmt="o", color=f"C{i % 10}", capsize=3, label=setting)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("MB read per token", fontsize=8)
        ax.set_ylabel(metric, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    for ax in axes[len(tasks) :]:
        ax.set_axis_off()
    for ax in list(axes)[len(tasks) :]:
        ax.set_visible(False)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    if labels:
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    drawn.suptitle(f"Quality over bytes read, {result.get('model', '')}", fontsize=11)
    return drawn


def save_figure(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figure as compare.png and compare.svg, whole or not at all; returns them. Raises: ConfigError."""
    drawn, files = figure(result), [folder / f"compare.{kind}" for kind in ("png", "svg")]
    if drawn is None:
        return []
    for path in files:
        with atomic_write(path, "wb") as file:
            drawn.savefig(file, format=path.suffix[1:], dpi=150)
    return files


def _by_layer(result: dict[str, Any]) -> Table:
    """What was read of each layer while scoring."""
    from rich.table import Table

    titles = {"heads": "heads", "mlp": "MLP", "mlp_recall": "recall"}
    # What reads everything has nothing to show.
    shown = {s: r for s, r in result["reads"].items() if r["mlp"] and any(x != 1 for x in r["mlp"] + r["heads"])}
    table = Table(title="Read by layer, and the share of the non-zero neurons that was read")
    table.add_column("layer", justify="right")
    for setting in shown:
        for title in titles.values():
            table.add_column(f"{setting}: {title}" if title == "heads" else title, justify="right")
    for layer in range(max((len(reads["mlp"]) for reads in shown.values()), default=0)):
        cells = (reads[key] and f"{reads[key][layer]:.1%}" for reads in shown.values() for key in titles)
        table.add_row(str(layer), *(cell or "-" for cell in cells))
    return table


def _title(result: dict[str, Any]) -> str:
    parts = [str(result.get("model", "")), result.get("dtype", "")]
    if result["num_fewshot"] is not None:
        parts.append(f"{result['num_fewshot']} examples")
    if result["limit"] is not None:
        parts.append(f"at most {result['limit']} documents a task")
    return ", ".join(part for part in parts if part)


def _value(metric: str, row: dict[str, Any]) -> str:
    error = row["stderr"]
    if row["value"] is None:
        return "-"
    if "perplexity" in metric or "bits" in metric:
        return f"{row['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
    return f"{row['value']:.2%}" + ("" if error is None else f" ± {error:.2%}")


def _difference(metric: str, row: dict[str, Any]) -> str:
    if row.get("difference") is None:
        return "-"
    ends = [row["difference"], row["low"], row["high"]]
    mean, *interval = ("?" if x is None else f"{100 * x:+.2f}" for x in ends)
    return f"{mean} [{', '.join(interval)}] {'%' if row.get('relative') else 'points'}"


def _mean(values: list[float] | None) -> str:
    return "-" if values is None else f"{sum(values) / len(values):.1%}"


def _paired_error(row: dict[str, Any]) -> list[list[float]] | None:
    """Distances down and up to the ends of the paired interval, in the metric's unit; None for the reference."""
    if row.get("low") is None:
        return None
    if row.get("relative"):
        base = row["value"] / (1 + row["difference"])
        ends = [base * (1 + row[k]) for k in ("low", "high")]
    else:
        ends = [row["value"] + row[k] - row["difference"] for k in ("low", "high")]
    return [[max(0.0, row["value"] - ends[0])], [max(0.0, ends[1] - row["value"])]]
