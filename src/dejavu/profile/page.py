"""One HTML page that holds every figure and two sentences on each, and needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from dejavu.artifacts import atomic_write
from dejavu.profile.explain import HEADINGS, explain
from dejavu.profile.figures import draw, render

PAGE_FILE = "profile.html"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { width: 100%; } figure { margin: 1rem 0; } h2 { margin-top: 2.5rem; } code { overflow-wrap: anywhere; }
table { border-collapse: collapse; } td { padding: 0.1rem 1.5rem 0.1rem 0; vertical-align: top; }
"""


def write_page(result: dict, folder: Path) -> None:
    """Write each figure as PNG and SVG, and the page; each file whole or not at all.

    Args:
        result: what profile.json holds.
    """
    sections = []
    for name, figure in draw(result).items():
        svg = render(figure, "svg")
        for kind, data in (("svg", svg), ("png", render(figure, "png"))):
            with atomic_write(folder / f"{name}.{kind}", "wb") as file:
                file.write(data)
        # As an image: ids inside one SVG cannot clash with those of another.
        source = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
        sections.append(
            f'<section id="{name}"><h2>{escape(HEADINGS[name])}</h2>\n<p>{escape(explain(name, result))}</p>\n'
            f'<figure><img alt="{escape(HEADINGS[name])}" src="{source}"></figure></section>'
        )
    with atomic_write(folder / PAGE_FILE) as file:
        file.write(_page(result, sections))


def _page(r: dict, sections: list[str]) -> str:
    facts = {
        "model": r["model"],
        "checkpoint": r["checkpoint_hash"],
        "shape": f"{r['layers']} layers, {r['heads']} heads and {r['neurons']} neurons ({r['activation']}) in each",
        "weights": r["dtype"],
        "text": ", ".join(r["text"]["sources"]),
        "tokens watched": f"{r['text']['watched_tokens']:,}, in windows of {r['window']}",
        "tokens judged": f"{r['quality_tokens'] // r['window'] * r['window']:,}, not among those watched",
    }
    rows = "".join(f"<tr><td>{escape(k)}</td><td><code>{escape(v)}</code></td></tr>" for k, v in facts.items())
    title = f"Profile of {escape(r['model'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<table>{rows}</table>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
