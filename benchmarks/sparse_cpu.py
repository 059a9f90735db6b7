"""Sparse decode on the CPU at the paper's densities: dense, sparse and every peer, in turn, in one run.

    python benchmarks/sparse_cpu.py
    python benchmarks/sparse_cpu.py --shape opt-1.3b --only ours --only llama-cpp
    python benchmarks/sparse_cpu.py --only batches
    python benchmarks/sparse_cpu.py --only mlp

Random weights in public shapes show speed, never quality. Sparse runs are led by predictors of random weights, whose
time is inside; `--policy static` reads sets that stay, which cost no choosing, `--policy both` times both. Nearly all
neurons fire, so that every selected row is really read. Parts: `ours`, each peer by name, `batches` (time and union
density over the batch, with the crossover and, as "always", without it) and `mlp` (one MLP over density, beside
PyTorch's dense one and the bandwidth line).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console

from dejavu.bench import record, report, settings, shapes
from dejavu.bench.bandwidth import read_bandwidth
from dejavu.bench.names import check_name
from dejavu.bench.peers import PEERS
from dejavu.bench.run import PeerRun, measure
from dejavu.bench.settings import FORMATS, Setting
from dejavu.bench.timing import interleave, percentiles_ms
from dejavu.config import SelectionConfig
from dejavu.engine.engine import set_threads
from dejavu.errors import DejavuError
from dejavu.kernels import backend as load_backend
from dejavu.selection.fixed import fixed_selection

RESULTS = Path(__file__).parent / "results" / "sparse_cpu.jsonl"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WIDTHS = ("bf16", "int8", "int4")
BATCHES = (1, 2, 4, 8, 16)
MLP_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
PARTS = ("ours", *PEERS, "batches", "mlp")
POLICIES = ("predictor", "static")
ACTIVITY = 0.999


def main_settings(
    selection: SelectionConfig, policy: str, prompt: int, batches: tuple[int, ...] = (1,)
) -> list[Setting]:
    """Dense and sparse in every format of the issue that this version has; batches in bf16 alone, where a sparse step
    is timed with its crossover and without."""
    single = batches == (1,)
    formats = [form for form in WIDTHS if form in FORMATS] if single else ["bf16"]
    selections = [selection] if single else [selection, replace(selection, crossover=False)]
    every = [
        settings.grid(("dense", "sparse"), selections, formats, batches, (prompt,), random_predictor=who == "predictor")
        for who in POLICIES
        if policy in (who, "both")
    ]
    return list(dict.fromkeys(chain(*every)))


def peer_runs(names: list[str], prompt: int, note) -> list[PeerRun]:
    """Every installed peer in each width that it has; those that are not installed are named."""
    runs = []
    for name in names:
        if reason := PEERS[name].missing():
            note(f"{name}: {reason}")
            continue
        offered = PEERS[name].formats()
        # A CPU without bf16 kernels leaves a peer fp32 as its nearest.
        widths = [form for form in WIDTHS if form in offered] + (["fp32"] if "bf16" not in offered else [])
        runs += [PeerRun(name, form, prompt) for form in widths]
    return runs


def mlp_curve(shape: str, ops: ModuleType, repeat: int, seed: int = 0) -> dict[str, Any]:
    """Milliseconds of one MLP of a shape, by density, and of PyTorch's dense one. Layers differ, caches stay cold."""
    config = shapes.parse(shapes.shape(shape) | {"num_hidden_layers": 4, "vocab_size": 64})
    weights = shapes.random_weights(config, torch.bfloat16, ops, seed, ACTIVITY)
    neurons, C = config.intermediate_size, config.hidden_size
    x = torch.randn(1, C, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    mlps = [layer.mlp for layer in weights.layers]
    linear = [
        (m.rows[:, 0].contiguous(), m.in_bias.bfloat16(), m.rows[:, 1].t().contiguous(), m.out_bias.bfloat16())
        for m in mlps
    ]

    def ours(density: float) -> list[float]:
        times = []
        for m in mlps:
            keep = fixed_selection(torch.randperm(neurons, generator=generator)[: max(1, round(density * neurons))])
            began = perf_counter()
            ops.mlp(x, m.rows, m.in_bias, keep if density < 1 else None, activation=config.activation)
            times.append(perf_counter() - began)
        return times

    def dense() -> list[float]:
        times, y = [], x.bfloat16()
        for w1, b1, w2, b2 in linear:
            began = perf_counter()
            torch.nn.functional.linear(torch.nn.functional.linear(y, w1, b1).relu(), w2, b2)
            times.append(perf_counter() - began)
        return times

    runs = {str(density): partial(ours, density) for density in MLP_DENSITIES}
    with torch.inference_mode():
        times = interleave([lambda: runs | {"PyTorch dense": dense}], repeat, warmup=2)
    return {
        "shape": shape,
        "mlp_bytes": 4 * neurons * C,
        "read_bandwidth_bytes_per_s": read_bandwidth(ops),
        "mlp_ms": {name: percentiles_ms(seconds) for name, seconds in times.items()},
    }


def mlp_figure(fields: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, ms = figure.subplots(), fields["mlp_ms"]
    limit = fields["mlp_bytes"] / fields["read_bandwidth_bytes_per_s"] * 1e3
    axes.plot(MLP_DENSITIES, [ms[str(d)]["p50_ms"] for d in MLP_DENSITIES], marker="o", label="selected neurons, bf16")
    axes.plot(MLP_DENSITIES, [limit * d for d in MLP_DENSITIES], "--", color="C7", label="limit: bytes over bandwidth")
    axes.axhline(ms["PyTorch dense"]["p50_ms"], color="C1", label="PyTorch dense, bf16")
    axes.set(xlabel="MLP density", ylabel="ms, median", xscale="log", yscale="log", title=f"One MLP, {fields['shape']}")
    axes.legend()
    return figure


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Random weights in these shapes.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}. [default: all]")] = None,
    mlp_density: Annotated[float, typer.Option(help="Of the neurons.")] = 0.10,
    attn_density: Annotated[float, typer.Option(help="Of the query heads.")] = 0.42,
    policy: Annotated[str, typer.Option(help="Who selects: predictor, static, or both.")] = "predictor",
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    new: Annotated[int, typer.Option(min=1, help="New tokens that are timed in each round.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, ours and theirs. [default: all]")] = None,
    work: Annotated[Path | None, typer.Option(help="Keep the peers' converted models in this folder.")] = None,
    seed: int = 0,
    results: Annotated[Path, typer.Option(help="Records are appended here.")] = RESULTS,
    figures: Annotated[Path, typer.Option(help="A folder for the figures.")] = FIGURES,
) -> None:
    err, out = Console(stderr=True, highlight=False), Console(width=160)
    try:
        parts = [check_name("part", part, PARTS) for part in only or PARTS]
        ops = load_backend("cpu")
        set_threads(ops, threads)
        check_name("policy", policy, (*POLICIES, "both"))
        selection = SelectionConfig("static", mlp_density, attn_density, kv="lazy", seed=seed)
        append = partial(record.append, results, benchmark="sparse_cpu", isa=ops.isa())
        for name in shape or ("opt-6.7b", "opt-1.3b"):
            subject = settings.shape(name, ops, seed, ACTIVITY)
            kept = None if work is None else work / name
            time = partial(
                measure, subject, ops, new_tokens=new, repeat=repeat, threads=threads,
                progress=lambda run, done, total: err.print(f"{done + 1}/{total}: {run}"),
            )  # fmt: skip
            others = peer_runs([part for part in parts if part in PEERS], prompt, err.print)
            if others or "ours" in parts:
                mine = main_settings(selection, policy, prompt) if "ours" in parts else []
                fields = append(part="main", **time(mine, others, work=kept))
                for table in report.tables(fields, subject.title):
                    out.print(table)
            if "batches" in parts:
                fields = append(part="batches", **time(main_settings(selection, policy, prompt, BATCHES)))
                for table in report.tables(fields, subject.title):
                    out.print(table)
                drawn = report.figures(fields, subject.title)
                report.save({f"{name}-batch": drawn["batch"]}, figures)
            if "mlp" in parts:
                fields = append(part="mlp", **mlp_curve(name, ops, 5 * repeat, seed))
                report.save({f"{name}-mlp": mlp_figure(fields)}, figures)
                out.print({density: round(ms["p50_ms"], 3) for density, ms in fields["mlp_ms"].items()})
    except DejavuError as error:
        err.print(f"error: {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    # The compiler tells of every choice that it tries.
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    typer.run(main)
