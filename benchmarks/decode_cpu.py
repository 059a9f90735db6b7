"""Decode on the CPU, batch 1: our dense and exact modes beside Hugging Face eager, in turn, in one run.

    python benchmarks/decode_cpu.py
    python benchmarks/decode_cpu.py --shape opt-1.3b --compiled
    python benchmarks/decode_cpu.py --model opt-mini

First the bundled model must write the same text as Hugging Face does; then times are taken, and in the same rounds
the read bandwidth of the machine. A model that does not fit into memory twice is built anew for every run. Random
weights show speed, never quality.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from dejavu.bench import record, shapes
from dejavu.bench.bandwidth import read_bandwidth
from dejavu.bench.decode import Dejavu, common_prefix, decode_times, greedy, random_prompt
from dejavu.bench.peers.hugging_face import CompiledHuggingFace, HuggingFace, load_hugging_face, random_hugging_face
from dejavu.bench.timing import Run, interleave, percentiles_ms
from dejavu.checkpoint.layout import allocate
from dejavu.checkpoint.source import BUNDLED, open_checkpoint
from dejavu.config import Mode, ModelConfig
from dejavu.device import hardware, parse_dtype
from dejavu.errors import DejavuError
from dejavu.kernels import backend as load_backend
from dejavu.model.decoder import Decoder
from dejavu.model.load import load_weights

RESULTS = Path(__file__).parent / "results" / "decode_cpu.jsonl"
DTYPE = "bf16"
EAGER, COMPILED = "HF eager", "HF compiled"
# First steps of every run, which don't count.
SKIP = 4
# How much of the machine's memory models may fill when they are held side by side.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Subject:
    """What is timed: how to make it, ours and Hugging Face's, and what a record says of it."""

    about: dict[str, Any]
    config: ModelConfig
    ours: Callable[[], Decoder]
    hugging_face: Callable[[], PreTrainedModel]

    @property
    def modes(self) -> list[Mode]:
        """Those that need nothing but the weights."""
        return [mode for mode in ("dense", "exact") if mode in self.config.modes]

    @property
    def weight_bytes(self) -> int:
        sizes: list[int] = []
        allocate(self.config, parse_dtype(DTYPE), lambda shape, dtype: sizes.append(prod(shape) * dtype.itemsize))
        return sum(sizes)


def shape_subject(name: str, ops: ModuleType, seed: int, mlp_density: float) -> Subject:
    dtype, config = parse_dtype(DTYPE), shapes.parse(shapes.shape(name))
    density = mlp_density if config.mlp_bias else 0.5
    return Subject(
        {"shape": name, "weights": "random", "seed": seed},
        config,
        lambda: Decoder(config, shapes.random_weights(config, dtype, ops, seed, density), ops),
        lambda: random_hugging_face(shapes.shape(name), dtype, seed),
    )


def model_subject(name: str, ops: ModuleType, dtype: str = DTYPE) -> Subject:
    checkpoint = open_checkpoint(name)
    return Subject(
        {"model": checkpoint.name, "model_hash": checkpoint.hash},
        shapes.parse(checkpoint.config),
        lambda: Decoder(*load_weights(checkpoint, ops=ops, dtype=dtype), ops),
        lambda: load_hugging_face(checkpoint.path, parse_dtype(dtype)),
    )


def check(name: str, ops: ModuleType, new_tokens: int = 200) -> None:
    """Stop unless every mode of a model writes what Hugging Face writes, greedily, in fp32."""
    subject = model_subject(name, ops, "fp32")
    decoder, theirs = subject.ours(), HuggingFace(subject.hugging_face())
    prompt = [subject.config.bos_token_id or 0, *random_prompt(subject.config.vocab_size, 7, seed=0)]
    expected = greedy(theirs, prompt, new_tokens)
    for mode in subject.modes:
        ours = greedy(Dejavu(decoder, len(prompt) + new_tokens, mode), prompt, new_tokens)
        if (same := common_prefix(ours, expected)) < new_tokens:
            raise DejavuError(f"{name}, {mode}: token {same + 1} is not Hugging Face's; no times are taken")


def measure(
    subject: Subject, ops: ModuleType, prompt: int, new: int, repeat: int, compiled: bool, note: Callable[[str], None]
) -> dict[str, Any]:
    """Time a subject; returns the fields of its record."""
    ids, capacity = random_prompt(subject.config.vocab_size, prompt, seed=0), prompt + SKIP + new
    bytes_read: dict[str, dict[str, float]] = {}
    density: dict[str, float] = {}

    def run(name: str, peer: Any) -> list[float]:
        seconds = decode_times(peer, ids, new, SKIP)
        if isinstance(peer, Dejavu):
            bytes_read[name], density[name] = peer.bytes_per_token(), peer.mlp_density()
        return seconds

    def ours() -> dict[str, Run]:
        decoder = subject.ours()
        return {mode: partial(run, mode, Dejavu(decoder, capacity, mode)) for mode in subject.modes}

    def hugging_face() -> dict[str, Run]:
        model = subject.hugging_face()
        runs = {EAGER: partial(run, EAGER, HuggingFace(model))}
        if compiled:
            runs[COMPILED] = partial(run, COMPILED, CompiledHuggingFace(model, capacity))
        return runs

    def bandwidth() -> dict[str, Run]:
        return {"second per byte": lambda: [1 / read_bandwidth(ops)]}

    copies = 3 if compiled else 2  # the compiled one keeps its weights packed in a copy
    keep = copies * subject.weight_bytes < MEMORY_SHARE * hardware()["memory_bytes"]
    times = interleave(
        [bandwidth, ours, hugging_face],
        repeat,
        warmup=1 if keep else 0,
        keep=keep,
        progress=lambda name, number: note(f"{'warm-up' if number < 0 else f'round {number + 1}/{repeat}'}: {name}"),
    )
    limit = 1e3 / percentiles_ms(times.pop("second per byte"))["p50_ms"]

    results = {name: percentiles_ms(seconds) for name, seconds in times.items()}
    eager_ms = results[EAGER]["p50_ms"]
    for name, result in results.items():
        # Hugging Face reads every weight and no less.
        parts = bytes_read.get(name, bytes_read["dense"])
        result["tok_per_s"] = 1e3 / result["p50_ms"]
        result["bytes_per_token"] = parts
        result["bandwidth_share"] = sum(parts.values()) * result["tok_per_s"] / limit
        result["times_hf_eager"] = eager_ms / result["p50_ms"]
        result["mlp_density"] = density.get(name, 1.0)
    return {
        **subject.about,
        "dtype": DTYPE,
        "batch": 1,
        "prompt": prompt,
        "new_tokens": new,
        "repeat": repeat,
        "side_by_side": keep,
        "read_bandwidth_bytes_per_s": limit,
        "results": results,
    }


def table(fields: dict[str, Any]) -> Table:
    limit, what = fields["read_bandwidth_bytes_per_s"], fields.get("model") or f"{fields['shape']}, random weights"
    out = Table(title=f"{what}, {DTYPE}; this machine reads {limit / 1e9:.1f} GB/s")
    for column in ("", "ms p20", "p50", "p80", "tok/s", "GB/token", "of bandwidth", "MLP density", "x HF eager"):
        out.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, r in fields["results"].items():
        ms = (f"{r[p]:.3g}" for p in ("p20_ms", "p50_ms", "p80_ms"))
        gigabytes = sum(r["bytes_per_token"].values()) / 1e9
        shares = (f"{r['bandwidth_share']:.1%}", f"{r['mlp_density']:.1%}", f"{r['times_hf_eager']:.2f}")
        out.add_row(name, *ms, f"{r['tok_per_s']:.2f}", f"{gigabytes:.3f}", *shares)
    return out


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Random weights of {', '.join(shapes.SHAPES)}.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A checkpoint, or opt-mini.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, ours and theirs.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    new: Annotated[int, typer.Option(min=1, help="New tokens that are timed.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    mlp_density: Annotated[float, typer.Option(help="Of random weights: the share of neurons that is active.")] = 0.1,
    compiled: Annotated[bool, typer.Option(help="Hugging Face with a static cache, compiled, too.")] = False,
    backend: Annotated[str, typer.Option(help="Of our kernels.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    results: Annotated[Path, typer.Option(help="Records are appended here.")] = RESULTS,
) -> None:
    if not (shape or model):
        shape, model = ["opt-1.3b", "opt-6.7b"], [BUNDLED]
    out, err = Console(width=120), Console(stderr=True)
    try:
        ops = load_backend(backend)
        torch.set_num_threads(threads)
        if hasattr(ops, "set_threads"):
            ops.set_threads(threads)
        subjects = [model_subject(name, ops) for name in model or ()]
        subjects += [shape_subject(name, ops, seed, mlp_density) for name in shape or ()]
        check(BUNDLED, ops)
        err.print(f"{BUNDLED}: the text is Hugging Face's, in every mode", highlight=False)
        kernels = {"backend": ops.__name__.rpartition(".")[2], "isa": ops.isa() if hasattr(ops, "isa") else None}
        for subject in subjects:
            fields = measure(subject, ops, prompt, new, repeat, compiled, partial(err.print, highlight=False))
            record.append(results, benchmark="decode_cpu", threads=threads, **kernels, **fields)
            out.print(table(fields))
    except DejavuError as error:
        err.print(f"error: {error}", highlight=False)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    # The compiler tells of every choice that it tries.
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    sys.exit(typer.run(main))
