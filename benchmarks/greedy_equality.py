"""Greedy text: ours token for token Hugging Face's in fp32, and exact token for token dense.

    python benchmarks/greedy_equality.py --models-dir ../shared/models --text ../shared/data/text/wiki_heldout.txt

Prompts are the beginnings of documents, which a line <|endoftext|> separates. One different token is a failure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import dejavu
from dejavu.bench import record
from dejavu.bench.decode import common_prefix, greedy
from dejavu.bench.peers.hugging_face import HuggingFace, load_hugging_face
from dejavu.checkpoint.source import BUNDLED, open_checkpoint
from dejavu.errors import ConfigError, DejavuError

RESULTS = Path(__file__).parent / "results" / "greedy_equality.jsonl"
# The bundled model by its name; the other is a folder of --models-dir.
MODELS = ("opt-mini", "relu-llama-mini")
BOUNDARY = "\n<|endoftext|>\n"


def compare(model: str, texts: list[str], prompt: int, new: int, threads: int, backend: str) -> dict:
    """Write `new` tokens after the first `prompt` tokens of every text, three ways; returns the fields of a record."""
    checkpoint = open_checkpoint(model)
    dense = dejavu.load(model, dtype="fp32", mode="dense", threads=threads, backend=backend)
    exact, theirs = dense.with_mode("exact"), HuggingFace(load_hugging_face(checkpoint.path, torch.float32))
    same: dict[str, list[int]] = {"dense, Hugging Face": [], "exact, dense": []}
    for text in texts:
        ids = dense.tokenizer.encode(text)[:prompt]
        ours, skipping = (
            list(engine.generate(ids, max_new_tokens=new, ignore_eos=True).token_ids) for engine in (dense, exact)
        )
        same["dense, Hugging Face"].append(common_prefix(ours, greedy(theirs, ids, new)))
        same["exact, dense"].append(common_prefix(skipping, ours))
    about = {"model": checkpoint.name, "model_hash": checkpoint.hash, "dtype": "fp32", "batch": 1}
    return about | {"prompt": prompt, "new_tokens": new, "prompts": len(texts), "same_tokens": same}


def main(
    models_dir: Annotated[Path, typer.Option(help=f"Holds the folders {' and '.join(MODELS[1:])}.")],
    text: Annotated[Path, typer.Option(help="A text file to take prompts from.")],
    prompts: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 16,
    new: Annotated[int, typer.Option(min=1, help="New tokens.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    backend: Annotated[str, typer.Option(help="Of our kernels.")] = "auto",
    results: Annotated[Path, typer.Option(help="Records are appended here.")] = RESULTS,
) -> None:
    console, failed = Console(stderr=True, highlight=False), False
    try:
        texts = text.read_text(encoding="utf-8").split(BOUNDARY)[:prompts]
        if len(texts) < prompts:
            raise ConfigError(f"{text}: holds {len(texts)} documents, and {prompts} prompts were asked for")
        for name in MODELS:
            fields = compare(name if name == BUNDLED else str(models_dir / name), texts, prompt, new, threads, backend)
            record.append(results, benchmark="greedy_equality", threads=threads, **fields)
            for pair, counts in fields["same_tokens"].items():
                equal = sum(count == new for count in counts)
                failed |= equal < prompts
                print(f"{name}: {pair}: {equal} of {prompts} texts of {new} tokens are the same")
    except (DejavuError, OSError) as error:
        console.print(f"error: {error}")
        raise typer.Exit(1) from error
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(typer.run(main))
