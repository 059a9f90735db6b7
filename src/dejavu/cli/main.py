"""The command `dejavu`: one verb a file, errors in one line."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

import dejavu
from dejavu.cli.bench import bench
from dejavu.cli.demo import demo
from dejavu.cli.evaluate import compare, evaluate
from dejavu.cli.fit import fit, push, tune
from dejavu.cli.generate import generate
from dejavu.cli.info import info
from dejavu.cli.profile import profile
from dejavu.cli.quantize import quantize
from dejavu.errors import DejavuError


class _Group(TyperGroup):
    """Turns the errors that a user can cause into one line on stderr and exit code 1."""

    def invoke(self, ctx: typer.Context):
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (DejavuError, OSError) as error:
            # A reader that went away (`| head`) is no error; typer ends quietly.
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _verb in (generate, profile, fit, tune, push, info, quantize, demo, bench, compare):
    app.command()(_verb)
app.command("eval")(evaluate)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dejavu {dejavu.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Faster decoding of language models: read only the weights that matter for the token.

    Try: dejavu demo
    """


def _terminate(number: int, frame: object) -> None:
    """End as after Ctrl-C, by an exception: temporary files are removed, and what is whole stays."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command with the process's arguments."""
    signal.signal(signal.SIGTERM, _terminate)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: nobody wants to read it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # text of a model may hold characters that the terminal lacks
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # reported already; Python would try once more, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
