"""Options and output that verbs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from dejavu import config
from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from dejavu.engine.engine import Engine
    from dejavu.engine.generation import Stats
    from dejavu.progress import Progress


def _default(field: str) -> str:
    """How help shows a default that is the selection's own; typer itself would read [..] as markup."""
    return f"\\[default: {getattr(config.SelectionConfig(), field)}]"


Mode = Annotated[
    str,
    typer.Option(
        help="dense; exact: skip what a zero activation makes useless; sparse: read what --policy selects; "
        "auto: sparse with a --policy, else exact where the model allows it."
    ),
]
Policy = Annotated[str | None, typer.Option(help=f"Who selects in mode sparse: {', '.join(get_args(config.Policy))}.")]
Pack = Annotated[str | None, typer.Option(help="A sparsity pack: a folder, a hub id, or opt-mini, the bundled one.")]
Quality = Annotated[
    str | None, typer.Option(help="With --pack: its cheapest setting within this rise of perplexity, 1% or 0.01.")
]
MlpDensity = Annotated[
    float | None, typer.Option(help=f"With --policy: the fraction of the neurons to read. {_default('mlp_density')}")
]
AttnDensity = Annotated[
    float | None, typer.Option(help=f"With --policy: the fraction of the heads to read. {_default('attn_density')}")
]
Kv = Annotated[
    str | None,
    typer.Option(help=f"With --policy: full keys and values, or lazy: when a head is next selected. {_default('kv')}"),
]
Calibration = Annotated[Path | None, typer.Option(help="With --policy static: a text to find the set on.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: fp32, bf16, fp16, or auto: as stored.")]
WeightsFormat = Annotated[
    str | None,
    typer.Option("--weights", help="Quantise while loading: int8, int4, or int4-g32, int4-g128z: group, zero point."),
]
QuantizeEmbeddings = Annotated[
    bool, typer.Option("--quantize-embeddings", help="With --weights: the embeddings and the LM head too.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: all]", show_default=False)]
Backend = Annotated[
    str, typer.Option(help="Of the kernels: cpu, triton (NVIDIA GPU), reference (slow, plain PyTorch) or auto.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def make_selection(
    policy: str | None, *, calibration: Path | None, **fields: float | str | None
) -> config.SelectionConfig | None:
    """What --policy and the options that go with it ask for; None without --policy.

    Args:
        fields: of SelectionConfig, by name; None takes the default.
    Raises: ConfigError for an option that would be ignored, or a value out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if policy is None:
        if lost := [*given, *(["calibration"] if calibration is not None else [])]:
            raise ConfigError(f"--{lost[0].replace('_', '-')} goes with --policy, which is not given")
        return None
    if calibration is not None and policy != "static":
        raise ConfigError(f"--calibration goes with --policy static, found {policy}")
    return config.SelectionConfig(policy, **given)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, gone when it is done: what is being done, how much of it, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    shown = Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600
    )
    with shown:
        task = shown.add_task("preparing", total=None)

        def progress(what: str, done: int, total: int) -> None:
            if total != shown.tasks[0].total or done < shown.tasks[0].completed:
                # Something else is counted now, or an earlier run did the beginning: no measure of the speed.
                shown.reset(task, total=total, completed=done, description=what)
            shown.update(task, description=what, completed=done)

        yield progress


def load_engine(model: str, **settings) -> Engine:
    """dejavu.load with a progress bar."""
    from dejavu.engine.engine import Engine

    with progress_bar() as progress:
        return Engine.load(model, progress=progress, **settings)


def stats_table(stats: dict[str, Stats]) -> Table:
    """A table with one column of figures for each named run."""
    from rich.filesize import decimal
    from rich.table import Table

    table = Table()
    for name in ("", *stats):
        table.add_column(name, justify="right" if name else "left")

    def add(label: str, cells: Iterable[str | None]) -> None:
        table.add_row(label, *(cell or "-" for cell in cells))

    runs = list(stats.values())
    add("prompt, new tokens", (f"{s.prompt_tokens}, {s.new_tokens}" for s in runs))
    add("first token after", (f"{s.ttft_s * 1e3:.1f} ms" for s in runs))
    add("prompt tokens per second", (f"{s.prefill_tok_per_s:,.0f}" for s in runs))
    add("time per token, median", (s.step_ms_p50 and f"{s.step_ms_p50:.2f} ms" for s in runs))
    add("tokens per second", (s.decode_tok_per_s and f"{s.decode_tok_per_s:.1f}" for s in runs))
    for part in runs[0].step_bytes or ():
        add(f"read per token: {part}", (s.step_bytes and decimal(round(s.step_bytes[part])) for s in runs))
    add("read per token", (s.step_bytes and decimal(round(sum(s.step_bytes.values()))) for s in runs))
    add("MLP density", (s.mlp_density and f"{s.mean_mlp_density:.1%}" for s in runs))
    for part, name in enumerate(("heads", "MLP")):
        if any(s.whole[part] for s in runs):
            add(f"layers with {name} read whole, as faster", (str(len(s.whole[part])) for s in runs))
    add("attention density", (s.attn_density and f"{s.mean_attn_density:.1%}" for s in runs))
    return table
