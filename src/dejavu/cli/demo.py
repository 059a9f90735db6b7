"""`dejavu demo`: the bundled model writes, dense, exact and sparse, side by side."""

from __future__ import annotations

from statistics import mean, median
from typing import TYPE_CHECKING, Annotated

import typer

from dejavu.cli.options import Backend, Dtype, Threads, load_engine
from dejavu.config import SamplingParams, SelectionConfig

if TYPE_CHECKING:
    from dejavu.engine.generation import Stats

PROMPTS = (
    "The old house on the hill",
    "In the spring of 1842 the expedition",
    "Once upon a time there was a little bear who",
)


def demo(
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="For each prompt.", min=2)] = 60,
    dtype: Dtype = "auto",
    threads: Threads = None,
    backend: Backend = "auto",
) -> None:
    """Let the bundled model continue a few prompts, dense, exact and sparse, and compare texts, speed and bytes.

    Example: dejavu demo -n 100
    """
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from dejavu.checkpoint.source import BUNDLED

    dense = load_engine(BUNDLED, mode="dense", dtype=dtype, threads=threads, backend=backend)
    pack = SelectionConfig("predictor", pack=BUNDLED, kv="lazy")
    others, config = {"exact": dense.with_mode("exact"), "sparse": dense.with_mode("sparse", pack)}, dense.config
    typer.echo(
        f"{BUNDLED}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.intermediate_size} neurons a layer, weights in {str(dense.dtype).removeprefix('torch.')}\n"
    )
    runs: dict[str, list[Stats]] = {"dense": [], **{name: [] for name in others}}
    for engine in (dense, *others.values()):
        engine.generate(PROMPTS[0], max_new_tokens=8)  # the first run meets cold memory
    # A fixed number of tokens, so that every prompt weighs the same.
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    for prompt in PROMPTS:
        full = dense.generate(prompt, params)
        runs["dense"].append(full.stats)
        for name, engine in others.items():
            typer.echo(typer.style(f"{name}: {prompt}", bold=True), nl=False)
            for chunk in engine.stream(prompt, params):
                typer.echo(chunk.text, nl=False)
            runs[name].append(chunk.generation.stats)
            typer.echo(f"\n[{_compare(name, full.token_ids, chunk.generation.token_ids)}]\n")
    table = Table()
    for column in ("mode", "ms per token", "tokens per second", "read per token", "MLP density", "heads"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, stats in runs.items():
        table.add_row(
            mode,
            f"{median(s.step_ms_p50 for s in stats):.2f}",
            f"{mean(s.decode_tok_per_s for s in stats):.0f}",
            decimal(round(mean(sum(s.step_bytes.values()) for s in stats))),
            f"{mean(s.mean_mlp_density for s in stats):.1%}",
            f"{mean(s.mean_attn_density for s in stats):.1%}",
        )
    Console().print(table)


def _compare(name: str, dense: tuple[int, ...], other: tuple[int, ...]) -> str:
    same = next((at for at, pair in enumerate(zip(dense, other, strict=True)) if pair[0] != pair[1]), len(dense))
    if same == len(dense):
        return f"dense and {name} wrote the same {same} tokens"
    return f"dense and {name} differ from token {same + 1} on"
