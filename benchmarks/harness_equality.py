"""Dense scores beside those of the lm-evaluation-harness's own Hugging Face model, on the same documents in float32.

    python benchmarks/harness_equality.py ../shared/data/eval --limit 200

Needs the harness and accelerate (`pip install -e '.[dev]'`). Writes one record to results/harness_equality.jsonl.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

import dejavu
from dejavu.bench import record
from dejavu.checkpoint.source import open_checkpoint
from dejavu.evaluate.run import Evaluation
from dejavu.evaluate.tasks import TASK_SUFFIXES, local_names, quiet, read_local

RESULTS = Path(__file__).parent / "results" / "harness_equality.jsonl"


def main(
    data: Annotated[Path, typer.Argument(help="A folder of task files; see docs/evaluate.md.")],
    model: Annotated[str, typer.Option(help="A folder, hub id, or opt-mini.")] = "opt-mini",
    limit: Annotated[int, typer.Option(help="Documents of each task.")] = 200,
    text: Annotated[str, typer.Option(help="The text task of the folder.")] = "wikitext2_test",
) -> None:
    quiet()
    files = local_names(data)
    names = [name for name, file in files.items() if file.name.endswith(TASK_SUFFIXES)]
    engine = dejavu.load(model, dtype="fp32", mode="dense")
    hugging_face = HFLM(pretrained=str(open_checkpoint(model).path), device="cpu", dtype="float32", batch_size=4)
    tasks = [read_local(name, files[name], limit).build(None) for name in names]
    theirs = simple_evaluate(hugging_face, tasks=tasks, bootstrap_iters=0)["results"]
    ours = Evaluation(engine, names, data_dir=data, limit=limit).run({"dense": engine})["tasks"]
    rows = {
        f"{name} {metric}": (row["dense"]["value"], theirs[name][f"{metric},none"])
        for name in names
        for metric, row in ours[name]["metrics"].items()
    }
    # The whole text, as convention has it for its perplexity per word.
    whole = Evaluation(engine, [text], data_dir=data).run({"dense": engine})["tasks"][text]

    class Whole:
        args = (files[text].read_text(encoding="utf-8").strip(),)

    rolling = hugging_face.loglikelihood_rolling([Whole()])[0]
    for level in ("word", "byte"):
        value = whole["metrics"][f"{level}_perplexity"]["dense"]["value"]
        rows[f"{text} {level}_perplexity"] = value, math.exp(-rolling / whole[f"{level}s"])
    table = Table("", "ours", "the harness's Hugging Face model", "relative difference", title=f"{model}, fp32, dense")
    for name, (a, b) in rows.items():
        table.add_row(name, f"{a:.6f}", f"{b:.6f}", f"{a / b - 1:+.1e}" if b else "-")
    Console(width=120).print(table)
    scores = {name: {"ours": a, "theirs": b} for name, (a, b) in rows.items()}
    record.append(RESULTS, model=model, limit=limit, scores=scores)


if __name__ == "__main__":
    typer.run(main)
