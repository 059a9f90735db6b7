"""`dejavu profile`: see how sparse a model is on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.artifacts import to_json
from dejavu.cli.options import Dtype, Json, Revision, Threads, load_engine, progress_bar
from dejavu.profile.settings import ProfileConfig

DEFAULT = ProfileConfig()


def _list(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def profile(
    model: Annotated[str | None, typer.Argument(help="A folder or hub id. [default: the bundled model]")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file, a folder, - for stdin, or hf:ID, a data set; may be given several times."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("profile"),
    tokens: Annotated[int, typer.Option(help="Watch so many tokens at most.")] = DEFAULT.tokens,
    window: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = DEFAULT.window,
    error: Annotated[
        list[float] | None,
        typer.Option(help=f"Relative output error; several may be given. [default: {_list(DEFAULT.errors)}]"),
    ] = None,
    quality_tokens: Annotated[
        int, typer.Option(help="Tokens for perplexity over density; 0: leave it out.")
    ] = DEFAULT.quality_tokens,
    density: Annotated[
        list[float] | None,
        typer.Option(help=f"For perplexity; several may be given. [default: {_list(DEFAULT.densities)}]"),
    ] = None,
    sentence: Annotated[str, typer.Option(help="Whose attention is drawn.")] = DEFAULT.sentence,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = DEFAULT.seed,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds files.")] = False,
    dtype: Dtype = "fp32",
    threads: Threads = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure a model's contextual sparsity on text: profile.json, figures and a page, in one folder.

    A run that was stopped goes on when the same command is given again.

    Example: dejavu profile --text book.txt -o opt-mini-profile

    Example: dejavu profile facebook/opt-1.3b --text corpus/ --tokens 65536 --quality-tokens 0
    """
    if not text:
        raise typer.BadParameter("give --text: a file, a folder, - for stdin, or hf:ID")
    given = {"errors": error and tuple(error), "densities": density and tuple(density)}
    settings = ProfileConfig(
        tokens=tokens,
        window=window,
        quality_tokens=quality_tokens,
        sentence=sentence,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    result = _run(model, {"dtype": dtype, "threads": threads}, revision, text, output, settings, overwrite)
    if as_json:
        typer.echo(to_json(result))
        return
    from rich.console import Console

    Console().print(_table(result))
    typer.echo(f"{output}/profile.html shows the figures")


def _run(
    model: str | None,
    how: dict[str, Any],
    revision: str | None,
    text: list[str],
    output: Path,
    settings: ProfileConfig,
    overwrite: bool,
) -> dict:
    """The job, with a bar on stderr. how: as load_engine takes it."""
    # Imported here, because PyTorch takes seconds to import.
    from dejavu.artifacts import check_folder, locked
    from dejavu.checkpoint.source import BUNDLED, open_checkpoint
    from dejavu.profile.explain import HEADINGS
    from dejavu.profile.run import RESULT_FILE
    from dejavu.profile.run import profile as run
    from dejavu.profile.state import STATE_FILE

    name = model or BUNDLED
    drawn = [f"{figure}.{kind}" for figure in HEADINGS for kind in ("png", "svg")]
    check_folder(output, STATE_FILE, RESULT_FILE, "profile.html", *drawn)
    try:
        # The place comes first: one that cannot be written, or where another process works, is found before any work.
        with locked(output):
            engine = load_engine(name, mode="dense", backend="cpu", revision=revision, **how)
            checkpoint_hash = open_checkpoint(name, revision=revision).hash
            about = {"name": name, "checkpoint_hash": checkpoint_hash, "overwrite": overwrite}
            with progress_bar() as progress:
                return run(engine, text, output, settings, progress=progress, **about)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from what {output} holds", err=True)
        raise typer.Exit(130) from None


def _table(r: dict):
    from rich.table import Table

    error, firing = r["errors"][0], r["firing"]
    columns = {
        "layer": [str(layer) for layer in range(r["layers"])],
        "MLP: not zero": ["-"] * r["layers"] if firing is None else _percent(firing["density"]),
        f"MLP: oracle, error {error:g}": _percent(r["oracle"]["mlp"][0]),
        f"heads: oracle, error {error:g}": _percent(r["oracle"]["heads"][0]),
        "MLP: shared with last token": _percent((firing or r["mlp_sets"])["overlap"]),
        "MLP: never active": _percent((firing or r["mlp_sets"])["never"]),
    }
    table = Table(title=f"Densities of {r['model']}")
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _percent(values: list[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.1%}" for value in values]
