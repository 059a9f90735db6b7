"""The tables of docs/evaluate.md and its figures, from the records of quality.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

from matplotlib.figure import Figure

from dejavu.artifacts import atomic_write
from dejavu.evaluate import report

DOCS = Path(__file__).parents[1] / "docs"
SELECTION, PACKS = "quality_selection.jsonl", "quality_packs.jsonl"
PARTS = {"mlp": "MLP", "heads": "heads", "both": "both"}
POLICIES = ("oracle", "non_contextual", "static", "random")


def write(results: Path, docs: Path = DOCS) -> None:
    """Renew every table between its marks in evaluate.md, and every figure.

    A table of a record stands between `<!-- KIND MODEL -->` and `<!-- end -->`, KIND being selection, path or packs.
    """
    page = docs / "evaluate.md"
    text = page.read_text(encoding="utf-8")
    for model, r in _last(results / SELECTION).items():
        text = _put(text, f"selection {model}", selection_table(r))
        text = _put(text, f"path {model}", path_table(r))
        _save(selection_figure(r), docs / "figures" / f"quality_selection_{_file(model)}.png")
    for model, r in _last(results / PACKS).items():
        text = _put(text, f"packs {model}", packs_table(r))
        _save(report.figure(r), docs / "figures" / f"quality_{_file(model)}.png")
    with atomic_write(page, "w") as file:
        file.write(text)


def selection_table(r: dict) -> str:
    """Perplexity and BLiMP accuracy of every part and policy over densities."""
    densities = r["densities"][1:]
    head = ["read by choice", "policy", *(f"{density:g}" for density in r["densities"])]
    rows = []
    for part, title in PARTS.items():
        for policy in POLICIES:
            names = ["dense", *(f"{part} {policy} {density:g}" for density in densities)]
            points = [r["points"][name] for name in names]
            cells = [f"{p['perplexity']['value']:.1f}, {p['blimp']['value']:.1%}" for p in points]
            rows.append([title, policy.replace("_", "-"), *cells])
    return _table(head, rows)


def path_table(r: dict) -> str:
    """The same settings scored in both ways."""
    ways = r["by_path"]
    head = ["setting", "perplexity, masked", "perplexity, steps", "BLiMP, masked", "BLiMP, steps"]
    rows = []
    for name in ways["steps"]:
        cells = [f"{ways[w][name]['perplexity']['value']:.4f}" for w in ("masked", "steps")]
        cells += [f"{ways[w][name]['blimp']['value']:.1%}" for w in ("masked", "steps")]
        rows.append([name.replace("_", "-"), *cells])
    return _table(head, rows)


def packs_table(r: dict) -> str:
    """Every task under every setting, with the paired difference to dense; what is read; closeness on texts."""
    settings, reference = list(r["decode"]), r["reference"]
    others = [s for s in settings if s != reference]
    rows = []
    for task, found in r["tasks"].items():
        metric = next(m for m in report.MAIN if m in found["metrics"] and m != "perplexity")
        row = found["metrics"][metric]
        rows.append([f"{task} ({metric}, {found['documents']})", *(_score(metric, row[s]) for s in settings)])
    for title, key in (("MLP read", "mlp"), ("heads read", "heads"), ("MLP recall", "mlp_recall")):
        means = [r["reads"][s][key] for s in settings]
        rows.append([title, *(f"{sum(m) / len(m):.1%}" if m else "-" for m in means)])
    decode = [r["decode"][s] for s in settings]
    rows.append(["MB per token (fp32)", *(f"{d['bytes_per_token'] / 1e6:.1f}" for d in decode)])
    shares = [d["bytes_by_part"]["predictor"] / d["bytes_per_token"] for d in decode]
    rows.append(["of them predictors", *(f"{share:.1%}" for share in shares)])
    rows.append(["ms per token (fp32)", *(f"{d['ms_per_token']:.2f}" for d in decode)])
    for task, found in r["tasks"].items():
        if "token_perplexity" in found["metrics"]:
            close = [found["to_reference"][s] for s in others]
            cells = (f"{c['agreement']:.1%}, {c['kl']:.4f}" for c in close)
            rows.append([f"{task}: same next token, KL", "-", *cells])
    return _table(["task (metric, documents)", *settings], rows)


def selection_figure(r: dict) -> Figure:
    """Perplexity and BLiMP accuracy over density, a column for each part."""
    drawn = Figure(figsize=(11, 6), layout="constrained")
    axes = drawn.subplots(2, len(PARTS), sharex=True, sharey="row")
    shown = (("perplexity", f"perplexity, {r['tokens']} tokens"), ("blimp", f"BLiMP accuracy, {r['pairs']} pairs"))
    for line, (key, label) in zip(axes, shown, strict=True):
        for ax, (part, title) in zip(line, PARTS.items(), strict=True):
            for i, policy in enumerate(POLICIES):
                names = ["dense", *(f"{part} {policy} {density:g}" for density in r["densities"][1:])]
                values = [r["points"][name][key]["value"] for name in names]
                ax.plot(r["densities"], values, "o-", color=f"C{i}", markersize=4, label=policy.replace("_", "-"))
            ax.set_xscale("log")
            ax.set_xticks(r["densities"], [f"{density:g}" for density in r["densities"]])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            if key == "perplexity":
                ax.set_yscale("log")
                ax.set_title({"both": "MLP and heads"}.get(part, title))
            else:
                ax.axhline(0.5, color="gray", linestyle=":")
                ax.set_xlabel("density")
        line[0].set_ylabel(label)
    axes[0][0].legend(fontsize=8)
    drawn.suptitle(f"What contextual selection is worth, {r['model']}")
    return drawn


def _score(metric: str, row: dict) -> str:
    """The value, and the paired difference with its interval, or the reference's standard error."""
    relative = row.get("relative") or "perplexity" in metric
    value = f"{row['value']:.2f}" if relative else f"{row['value']:.1%}"
    if "difference" not in row:
        return value if relative or row["stderr"] is None else f"{value} ± {row['stderr']:.1%}"
    if row["difference"] == row["low"] == row["high"] == 0:
        return value
    # A single document has no interval.
    ends = () if row["low"] is None else (row["low"], row["high"])
    interval = f" [{', '.join(f'{100 * end:+.1f}' for end in ends)}]" if ends else ""
    return f"{value} ({100 * row['difference']:+.1f}{interval}{' %' if relative else ''})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _put(text: str, mark: str, table: str) -> str:
    found = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"evaluate.md has no place for: <!-- {mark} -->")
    return found.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)


def _last(file: Path) -> dict[str, dict]:
    """The last record of each model; none where there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {r["model"]: r for r in map(json.loads, lines)}


def _file(model: str) -> str:
    return model.replace("-", "_")


def _save(drawn: Figure, path: Path) -> None:
    with atomic_write(path, "wb") as file:
        drawn.savefig(file, format="png", dpi=110)
