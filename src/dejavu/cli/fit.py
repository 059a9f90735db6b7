"""`dejavu fit`, `dejavu tune` and `dejavu push`: make a sparsity pack, move along its frontier, hand it on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dejavu.artifacts import check_folder, check_new, locked, to_json
from dejavu.cli.options import Dtype, Json, Revision, Threads, load_engine, progress_bar
from dejavu.config import parse_share
from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from dejavu.predictor.settings import FitConfig
    from dejavu.selection.pack import Pack

STAGES = ("collect", "train", "calibrate")


def fit(
    model: Annotated[str, typer.Argument(help="A folder, hub id, or opt-mini.")],
    text: Annotated[list[str], typer.Option(help="A file, folder, - or hf:ID; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The pack's folder; must not exist.")],
    check_text: Annotated[
        list[str] | None, typer.Option(help="Choose and judge by other text than --text; may be given several times.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="To learn from.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="To search on, and as many to judge on.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens read in one piece; documents must be as long. [default: the context]")
    ] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(help="Bound: 1% or 0.01. [default: 1%]")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Bound instead: nats per token from the dense model.")] = None,
    target_density: Annotated[float | None, typer.Option(help="Bound instead: the mean MLP density.")] = None,
    rank: Annotated[str, typer.Option(help="Of the neurons' predictors, or auto: by bytes, layer by layer.")] = "auto",
    heads_ahead: Annotated[
        int | None, typer.Option(help="Blocks before its own that a heads' predictor reads.")
    ] = None,
    neurons_ahead: Annotated[int | None, typer.Option(help="The same for neurons.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of the predictors: int4, int8, bf16 ... [default: int4]")] = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="Keep the best linear maps; no gradient.")] = False,
    label_error: Annotated[float | None, typer.Option(help="For activations that are never zero, say 0.1.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of training.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of training.")] = None,
    stage: Annotated[str | None, typer.Option(help=f"End after this stage: {', '.join(STAGES)}.")] = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Make a sparsity pack: collect what the model does on text, train predictors, find cuts within a bound on quality.

    The work so far lies in OUT.work: the same command goes on where it was stopped. A pack that misses the bound is not
    written.

    Example: dejavu fit facebook/opt-1.3b --text corpus.txt -o opt-1.3b-pack
    """
    from dejavu.predictor.settings import FitConfig

    if stage not in (None, *STAGES):
        raise ConfigError(f"stage {stage!r} does not exist; choose one of: {', '.join(STAGES)}")
    asked = {
        "tokens": tokens,
        "calibration_tokens": calibration_tokens,
        "window": window,
        "rank": _rank(rank),
        "heads_ahead": heads_ahead,
        "neurons_ahead": neurons_ahead,
        "weights": weights,
        "label_error": label_error,
        "epochs": epochs,
        "seed": seed,
        "train": not no_train,
        **_bound(ppl_increase=parse_share(max_ppl_increase), kl=max_kl, mlp_density=target_density),
    }
    config = FitConfig(**{name: value for name, value in asked.items() if value is not None})
    pack = _run(model, {"dtype": dtype, "threads": threads, "revision": revision}, text, check_text, out, config, stage)
    if pack is not None:
        _finish(pack, out, as_json)


def _bound(**bounds: float | None) -> dict[str, str | float]:
    """The one bound that was asked for, as FitConfig takes it; none: its default."""
    given = {name: limit for name, limit in bounds.items() if limit is not None}
    if len(given) > 1:
        raise ConfigError("give one bound: --max-ppl-increase, --max-kl or --target-density")
    return {key: value for name, limit in given.items() for key, value in (("bound", name), ("limit", limit))}


def _run(
    model: str,
    how: dict[str, Any],
    text: list[str],
    check_text: list[str] | None,
    out: Path,
    config: FitConfig,
    stage: str | None,
) -> Pack | None:
    """The job, with a bar on stderr. how: as load_engine takes it."""
    from rich.console import Console
    from rich.filesize import decimal

    from dejavu.predictor.fit import fit as run
    from dejavu.predictor.fit import needs
    from dejavu.text import documents

    check_new(out)
    work = out.with_name(f"{out.name}.work")
    check_folder(work)
    with locked(work):
        pass  # whoever works there is found before the model is loaded
    engine = load_engine(model, mode="dense", backend="cpu", **how)
    need = needs(engine, config)
    Console(stderr=True, highlight=False).print(
        f"fit needs up to {decimal(need['disk'])} of disk and {decimal(need['memory'])} of memory beside the model"
    )
    try:
        with progress_bar() as progress:
            judging = documents(check_text) if check_text else None
            return run(engine, documents(text), out, config, check=judging, stage=stage, progress=progress)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from what {out}.work holds", err=True)
        raise typer.Exit(130) from None


def tune(
    pack: Annotated[str, typer.Argument(help="A pack's folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new pack's folder; must not exist.")],
    max_ppl_increase: Annotated[str, typer.Option(help="Take the cheapest point within this: 1% or 0.01.")],
    as_json: Json = False,
) -> None:
    """Move a pack along its stored frontier; nothing is trained.

    Example: dejavu tune opt-1.3b-pack --max-ppl-increase 3% -o opt-1.3b-pack-fast
    """
    from dejavu.predictor.fit import tune as run

    check_new(out)
    _finish(run(pack, out, parse_share(max_ppl_increase)), out, as_json)


def push(
    pack: Annotated[str, typer.Argument(help="A pack's folder.")],
    repo: Annotated[str, typer.Argument(help="Where to: OWNER/NAME on the Hugging Face Hub, made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
) -> None:
    """Upload a pack to the Hugging Face Hub, with the token that `hf auth login` keeps.

    Example: dejavu push opt-1.3b-pack someone/opt-1.3b-pack
    """
    from dejavu.predictor.fit import push as run

    typer.echo(run(pack, repo, private=private))


def _finish(pack: Pack, out: Path, as_json: bool) -> None:
    """A pack was written: its figure goes beside it, and its frontier is printed."""
    from dejavu.predictor.figure import save_frontier

    save_frontier(pack, out.name, out)
    show(pack, str(out), as_json)


def show(pack: Pack, name: str, as_json: bool, verified: bool | None = None) -> None:
    """Print what a pack holds: its frontier, with the default marked.

    verified: whether its hash is that of its files, which an old pack lacks; None says nothing of it.
    """
    facts = {
        "pack": name,
        "base": dict(pack.base),
        "lookahead": {"heads": pack.lookahead.heads, "neurons": pack.lookahead.neurons},
        "predictor_bytes": sum(p.nbytes for p in pack.predictors.values()),
        "default": pack.default,
        "points": [dict(point.measured) for point in pack.points],
        "made": dict(pack.made),
        **({} if verified is None else {"verified": verified}),
    }
    if as_json:
        typer.echo(to_json(facts))
        return
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(title=f"{name}: for {pack.base['name']}, predictors {decimal(facts['predictor_bytes'])}")
    for column in ("", "perplexity", "KL", "MLP density", "recall", "precision", "attention density", "bytes"):
        table.add_column(column, justify="right")
    for number, point in enumerate(pack.points):
        m = point.measured
        table.add_row(
            "default" if number == pack.default else "",
            f"{m['ppl_increase']:+.2%}",
            f"{m['kl']:.4f}",
            *(f"{m[k]:.1%}" if k in m else "-" for k in ("mlp_density", "mlp_recall", "mlp_precision", "attn_density")),
            decimal(round(m["bytes"])),
        )
    Console(width=110).print(table)
    if verified is not None:
        typer.echo(
            "verified: manifest and tensors are what was written (sha256)"
            if verified
            else "not verified: a pack of this age holds no hash of its files"
        )
    checked = pack.made.get("checked")
    if checked:
        typer.echo(f"default, on text that it was not chosen by: perplexity {checked['ppl_increase']:+.2%}")


def _rank(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"rank must be auto or a positive integer, found {text!r}")
    return int(text)
