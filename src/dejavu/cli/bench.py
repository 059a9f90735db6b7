"""`dejavu bench`: decode of a model or of a shape, beside its peers, in one run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dejavu.artifacts import check_folder, locked, to_json, write_json
from dejavu.cli import options
from dejavu.cli.options import Json, Threads
from dejavu.config import SelectionConfig
from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from dejavu.kernels.base import Backend

DEFAULT = SelectionConfig()
# Of the tables where no terminal says how wide it is: names of settings are long.
WIDTH = 160
# What --output holds.
RECORD, PARTIAL = "bench.jsonl", "bench.partial.json"
FIGURES = tuple(f"{name}.{kind}" for name in ("times", "density", "batch") for kind in ("png", "svg"))


Policy = Annotated[
    str | None,
    typer.Option(
        help="Of mode sparse. With --shape: predictor, of random weights, or static, random sets that stay. "
        "[default: oracle; static for a shape]"
    ),
]
Crossover = Annotated[
    bool, typer.Option("--crossover/--no-crossover", help="Read whole what that was measured to make faster.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="A folder for figures and bench.jsonl; bench.partial.json there holds the rounds so far."
    ),
]
Activity = Annotated[
    float | None,
    typer.Option(help="Of random weights: the share of neurons that fire. [default: 0.999 with sparse, else 0.1]"),
]


def bench(
    model: Annotated[str | None, typer.Argument(help="A folder or hub id. [default: the bundled model]")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights in a public shape, opt-6.7b say.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="dense, exact, sparse. [default: dense and exact]")] = None,
    policy: Policy = None,
    mlp_density: Annotated[list[float] | None, typer.Option(help="Of mode sparse. [default: 0.1]")] = None,
    attn_density: Annotated[list[float] | None, typer.Option(help="Of mode sparse. [default: 1]")] = None,
    kv: Annotated[str, typer.Option(help="Of mode sparse: full, or lazy.")] = DEFAULT.kv,
    crossover: Crossover = DEFAULT.crossover,
    dtype: Annotated[str, typer.Option(help="Of the weights where --weights is not given: bf16 or fp32.")] = "bf16",
    weights: Annotated[list[str] | None, typer.Option(help="Formats of our weights. [default: --dtype]")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows. [default: 1]")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens of each row's prompt. [default: 128]")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are timed in each round.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    threads: Threads = None,
    backend: options.Backend = "auto",
    peers: Annotated[list[str] | None, typer.Option(help="Peers by name, or none. [default: all installed]")] = None,
    peer_weights: Annotated[list[str] | None, typer.Option(help="Formats of theirs. [default: as ours]")] = None,
    work: Annotated[Path | None, typer.Option(help="Keep the peers' converted models in this folder.")] = None,
    output: Output = None,
    activity: Activity = None,
    seed: Annotated[int, typer.Option(help="Of random weights and random sets.")] = 0,
    as_json: Json = False,
) -> None:
    """Time decoding, settings and peers in turn; options of several values may be given several times.

    Random weights show speed, never quality. Peers run with batch 1.

    Example: dejavu bench --peers none -o results

    Example: dejavu bench --shape opt-1.3b --mode dense --mode sparse --mlp-density 0.1 --attn-density 0.42 --kv lazy
    """
    from dejavu.bench import settings
    from dejavu.bench.run import measure
    from dejavu.checkpoint.source import BUNDLED

    if model is not None and shape is not None:
        raise typer.BadParameter("give either MODEL or --shape")
    if output is not None:
        check_folder(output, RECORD, PARTIAL, *FIGURES)
    ops, peers = _backend(backend, threads, peers)
    if activity is None:
        # What a predictor selects mostly fires; a random set would else read a tenth of its fc2 rows.
        activity = 0.999 if "sparse" in (mode or ()) else 0.1
    subject = settings.shape(shape, ops, seed, activity) if shape else settings.model(model or BUNDLED, ops)
    how = {"kv": kv, "seed": seed, "crossover": crossover}
    selections, predicted = _selections(policy, shape is not None, mlp_density, attn_density, how)
    modes = mode or [m for m in ("dense", "exact") if m in subject.config.modes]
    formats, prompts = weights or [dtype], prompt or [128]
    chosen = settings.grid(modes, selections, formats, batch or [1], prompts, random_predictor=predicted)
    others = _peer_runs(peers, peer_weights or formats, prompts, subject.source.config)
    run = {"new_tokens": new_tokens, "repeat": repeat, "threads": threads, "work": work}
    fields = {"backend": ops.name, **_measured(output, partial(measure, subject, ops, chosen, others, **run))}
    if not shape and ops.can_record:
        fields["overhead_share"] = _overhead(model or BUNDLED, formats[0], threads, backend, min(prompts), new_tokens)
    _report(fields, subject.title, output, as_json)


def _backend(name: str, threads: int | None, peers: list[str] | None) -> tuple[Backend, list[str] | None]:
    """Ours, and the peers that may stand beside it: they run on the CPU."""
    from dejavu.engine.engine import set_threads
    from dejavu.kernels import backend

    ops = backend(name)
    set_threads(ops, threads)
    if ops.device.type == "cpu":
        return ops, peers
    if peers and "none" not in peers:
        raise ConfigError(f"peers run on the CPU, and backend {ops.name} does not: give --backend cpu")
    return ops, ["none"]


def _selections(
    policy: str | None,
    shape: bool,
    mlp_density: list[float] | None,
    attn_density: list[float] | None,
    how: dict[str, Any],
) -> tuple[list[SelectionConfig], bool]:
    """What mode sparse reads, every density with every other; and whether predictors of random weights choose."""
    predicted = policy == "predictor" and shape
    if policy == "static" and not shape:
        raise ConfigError("policy static needs a text to find its units on; it is timed with --shape only")
    who = "static" if predicted else policy or ("static" if shape else "oracle")
    pairs = product(mlp_density or (0.1,), attn_density or (1.0,))
    return [SelectionConfig(who, mlp, attn, **how) for mlp, attn in pairs], predicted


def _measured(output: Path | None, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Run with a bar; the rounds so far lie in the output folder."""
    rounds = None if output is None else output / PARTIAL
    with nullcontext() if output is None else locked(output), options.progress_bar() as progress:
        if rounds is None:
            return measure(progress=progress)
        _open(output, rounds)  # not before the lock: it may be another process's
        return measure(progress=progress, save=lambda fields: write_json(rounds, fields))


def _overhead(model: str, form: str, threads: int | None, backend: str, prompt: int, new_tokens: int) -> float:
    """The share of a token's time outside of the kernels, in the mode that the model runs in by itself."""
    from dejavu.bench.overhead import overhead_share
    from dejavu.engine.engine import Engine

    how = {"dtype": form} if form in ("bf16", "fp32") else {"weights": form, "quantize_embeddings": True}
    engine = Engine.load(model, threads=threads, backend=backend, **how)
    # The prompt gives the first token.
    return overhead_share(engine, [engine.config.bos_token_id or 0] * prompt, max(2, new_tokens))


def _report(fields: dict[str, Any], title: str, output: Path | None, as_json: bool) -> None:
    """Keep and print what was measured."""
    from rich.console import Console

    from dejavu.bench import record, report

    for name, r in fields["results"].items():
        if "died" in r:
            typer.echo(f"{name}: {r['died']}", err=True)
    if output is not None:
        fields = record.append(output / RECORD, benchmark="bench", **fields)
        (output / PARTIAL).unlink(missing_ok=True)
        files = report.save(report.figures(fields, f"{title}, {fields['threads']} threads"), output)
        wrote = ", ".join(str(file) for file in [*files, output / RECORD])
        Console(stderr=True).print(f"wrote {wrote}", highlight=False)
    if as_json:
        typer.echo(to_json(fields))
        return
    out = Console()
    if not out.is_terminal:
        out.width = WIDTH
    for table in report.tables(fields, title):
        out.print(table)
    if "overhead_share" in fields:
        out.print(f"outside of the kernels: {fields['overhead_share']:.1%} of a token's time")


def _open(output: Path, partial: Path) -> None:
    """See before anything long that what is measured can be kept in the folder."""
    try:
        with open(output / RECORD, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); choose another folder") from error
    write_json(partial, {"results": {}})


def _peer_runs(names: list[str] | None, formats: list[str], prompts: list[int], config: dict) -> list:
    """Each peer in each format that it has; what cannot run is said on stderr, and is an error where it was named."""
    from dejavu.bench.peers import PEERS, peer
    from dejavu.bench.run import PeerRun

    if names is not None and "none" in names:
        if len(names) > 1:
            raise ConfigError("--peers none goes with no other peer")
        return []
    runs = []
    for other in [peer(name) for name in names] if names else PEERS.values():
        try:
            offered = other.formats()
            for form in formats:
                if form in offered or names:
                    other.check(form, config)
                    runs += [PeerRun(other.name, form, prompt) for prompt in prompts]
                else:
                    typer.echo(f"{other.name}: offers {', '.join(offered)} here, not {form}", err=True)
        except ConfigError as error:
            if names:
                raise
            typer.echo(str(error), err=True)
    return runs
