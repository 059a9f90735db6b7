"""Decode on one GPU, batch 1, random weights in public shapes: our dense, exact and sparse steps, and Hugging Face.

    python benchmarks/decode_gpu.py OUT
    python benchmarks/decode_gpu.py OUT --shape opt-6.7b --shape opt-30b --prompt 128

Each of our steps is one CUDA graph, the choice of the next token included. The sparse step reads fixed random sets of
heads and neurons with lazy keys and values: it shows what the kernels make of the bytes that are read. No predictor
runs, so these are not yet a model's speed-ups. Random weights show speed, never quality.
"""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from dejavu.bench import record, shapes
from dejavu.bench.peers.hugging_face import random_hugging_face
from dejavu.bench.timing import percentiles_ms
from dejavu.config import SelectionConfig
from dejavu.engine.bytes import step_bytes
from dejavu.errors import DejavuError
from dejavu.kernels import backend
from dejavu.model.decoder import Decoder
from dejavu.selection import make_selector

DTYPE = torch.bfloat16
MODES = ("dense", "exact", "sparse")


def event_times(step, count: int) -> list[float]:
    """Seconds between consecutive steps on the GPU; the host runs ahead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


@torch.inference_mode()
def measure(decoder: Decoder, mode: str, prompt: int, new: int, selection: SelectionConfig, seed: int) -> dict:
    """Times, and bytes read, of one mode over `new` tokens after a prompt."""
    c, ops = decoder.config, decoder.ops
    selector = None
    if mode == "sparse":
        generator = torch.Generator("cuda").manual_seed(seed)
        importance = [
            tuple(
                torch.rand(n, device="cuda", generator=generator) for n in (c.num_attention_heads, c.intermediate_size)
            )
            for _ in range(c.num_hidden_layers)
        ]
        selector = make_selector(selection, c, decoder.weights, ops, importance=importance)
    cache = decoder.new_cache(1, prompt + new + 8, selection.pending if mode == "sparse" else None)
    ids, positions = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    rows_read = torch.zeros(c.num_hidden_layers, 3 if c.gated else 2, dtype=torch.int64, device="cuda")
    decoder.prefill(torch.arange(prompt) % c.vocab_size, cache)
    positions.fill_(prompt)

    def step() -> None:
        logits = decoder.step(ids, positions, cache, mode=mode, selector=selector, rows_read=rows_read)
        ids.copy_(logits.argmax(1))
        positions.add_(1)

    step()  # compiles the kernels
    torch.cuda.synchronize()
    with ops.capture() as capture:
        step()
    capture.graph.replay()
    rows_read.zero_()
    seconds = event_times(capture.graph.replay, new)
    heads = selection.counts(0, c)[0] if mode == "sparse" else c.num_attention_heads
    read = step_bytes(
        c,
        decoder.weights,
        attended=prompt + new / 2,
        rows_read=rows_read.cpu() / new,
        heads_read=torch.full((c.num_hidden_layers,), float(heads)),
        lazy=mode == "sparse",
    )
    density = (rows_read[:, -1].double().mean() / new / c.intermediate_size).item()
    return {**percentiles_ms(seconds), "bytes_per_token": read, "mlp_density": density}


@torch.inference_mode()
def measure_hugging_face(shape: str, prompt: int, new: int, seed: int) -> dict:
    """Times of Hugging Face eager with its growing cache, its launches included, as its users have it."""
    model = random_hugging_face(shapes.shape(shape), DTYPE, seed).to("cuda")
    cache = DynamicCache(config=model.config)
    state = {"ids": torch.zeros(1, prompt, dtype=torch.long, device="cuda")}

    def step() -> None:
        logits = model(input_ids=state["ids"], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        state["ids"] = logits[:, -1].argmax(-1, keepdim=True)

    for _ in range(4):
        step()
    return percentiles_ms(event_times(step, new))


def main(
    out: Annotated[Path, typer.Argument(help="A folder for the records.")],
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(shapes.SHAPES)}.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt.")] = None,
    new: Annotated[int, typer.Option(min=1, help="New tokens that are timed.")] = 64,
    mlp_density: Annotated[float, typer.Option(help="Of the neurons.")] = 0.10,
    attn_density: Annotated[float, typer.Option(help="Of the query heads.")] = 0.42,
    hugging_face: Annotated[bool, typer.Option(help="Time Hugging Face eager too, where both fit in turn.")] = True,
    seed: int = 0,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA GPU")
    ops, console = backend("triton"), Console(width=120)
    limit = ops.read_bandwidth(4 << 30, 5)
    selection = SelectionConfig("static", mlp_density, attn_density, kv="lazy")
    table = Table(title=f"random weights, bf16, batch 1; this GPU reads {limit / 1e12:.2f} TB/s")
    for column in ("shape", "prompt", "mode", "ms p20", "p50", "p80", "GB/token", "of bandwidth", "x dense", "x HF"):
        table.add_column(column, justify="right")
    for name in shape or ("opt-6.7b", "opt-13b", "opt-30b"):
        try:
            results = {}
            if hugging_face:
                for p in prompt or (128,):
                    results[p, "HF eager"] = measure_hugging_face(name, p, new, seed)
                gc.collect()
                torch.cuda.empty_cache()
            config = shapes.parse(shapes.shape(name))
            decoder = Decoder(config, shapes.random_weights(config, DTYPE, ops, seed, mlp_density), ops)
            for p in prompt or (128,):
                for mode in MODES:
                    results[p, mode] = measure(decoder, mode, p, new, selection, seed)
        except (DejavuError, torch.OutOfMemoryError) as error:
            console.print(f"{name}: {str(error).splitlines()[0]}", highlight=False)
        for (p, mode), r in results.items():
            read = sum(r.get("bytes_per_token", {}).values())
            share = read / r["p50_ms"] * 1e3 / limit if read else None
            record.append(
                out / "decode_gpu.jsonl",
                **{"benchmark": "decode_gpu", "shape": name, "weights": "random", "dtype": "bf16", "batch": 1},
                **{"prompt": p, "new_tokens": new, "mode": mode, "selection": "fixed random sets, no predictor"},
                **{"attn_density": attn_density if mode == "sparse" else 1.0, "seed": seed},
                **{"read_bandwidth_bytes_per_s": limit, "bandwidth_share": share, **r},
            )
            ratios = (results.get((p, other)) for other in ("dense", "HF eager"))
            table.add_row(
                *(name, str(p), mode, *(f"{r[k]:.3f}" for k in ("p20_ms", "p50_ms", "p80_ms"))),
                *(f"{read / 1e9:.2f}" if read else "-", f"{share:.1%}" if share else "-"),
                *(f"{other['p50_ms'] / r['p50_ms']:.2f}" if other else "-" for other in ratios),
            )
        decoder = None
        gc.collect()
        torch.cuda.empty_cache()
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
