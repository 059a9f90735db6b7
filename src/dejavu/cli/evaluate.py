"""`dejavu eval` and `dejavu compare`: quality, speed, density and bytes of settings over the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dejavu.artifacts import check_folder, locked, to_json
from dejavu.cli.options import (
    AttnDensity,
    Backend,
    Dtype,
    Json,
    Kv,
    MlpDensity,
    Mode,
    Pack,
    Policy,
    Quality,
    QuantizeEmbeddings,
    Revision,
    Threads,
    WeightsFormat,
    load_engine,
    make_selection,
    progress_bar,
)
from dejavu.config import pack_selection, parse_share
from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from dejavu.evaluate.settings import Setting
    from dejavu.progress import Progress

# Of the tables where no terminal says how wide it is.
WIDTH = 160
# That `compare` draws into its folder.
FIGURES = ("compare.png", "compare.svg")
# Between two lines of progress where there is no bar.
LINE_S = 15

Model = Annotated[str | None, typer.Argument(help="A folder or hub id. [default: the bundled model]")]
Tasks = Annotated[
    str,
    typer.Option(help="Names, with commas: of the lm-evaluation-harness, or of files in --data-dir; all."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="A folder of .jsonl and .txt files to take tasks from, instead of the hub.")
]
Text = Annotated[
    list[str] | None, typer.Option(help="Perplexity of a file, folder, - or hf:ID; may be given several times.")
]
Fewshot = Annotated[int | None, typer.Option(help="Examples before each document. [default: as the task says]")]
Limit = Annotated[int | None, typer.Option(help="Documents of a task at most.")]
TextTokens = Annotated[int | None, typer.Option(help="Tokens of a text at most.")]
Window = Annotated[int | None, typer.Option(help="Tokens a window of perplexity reads. [default: the context]")]
Stride = Annotated[int | None, typer.Option(help="Tokens a window scores. [default: the window]")]
Scoring = Annotated[
    str,
    typer.Option("--path", help="masked: all tokens at once, each under its own selection; steps: decode steps."),
]
Batch = Annotated[int, typer.Option(help="With --path steps: rows that decode together and share what they read.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="A folder; a stopped run goes on from it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds an evaluation.")]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Time decoding too, and count its bytes.")]
CalibrationText = Annotated[Path | None, typer.Option("--calibration", help="With policy static: a text for the set.")]


def evaluate(
    model: Model = None,
    tasks: Tasks = "",
    text: Text = None,
    data_dir: DataDir = None,
    mode: Mode = "auto",
    pack: Pack = None,
    quality: Quality = None,
    policy: Policy = None,
    mlp_density: MlpDensity = None,
    attn_density: AttnDensity = None,
    kv: Kv = None,
    calibration: CalibrationText = None,
    num_fewshot: Fewshot = None,
    limit: Limit = None,
    text_tokens: TextTokens = None,
    window: Window = None,
    stride: Stride = None,
    path: Scoring = "masked",
    batch: Batch = 1,
    output: Output = None,
    overwrite: Overwrite = False,
    speed: Speed = True,
    dtype: Dtype = "auto",
    weights: WeightsFormat = None,
    quantize_embeddings: QuantizeEmbeddings = False,
    threads: Threads = None,
    backend: Backend = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure a setting beside the dense model: scores and paired differences, what is read, and how fast it decodes.

    Example: dejavu eval --pack opt-mini --text book.txt

    Example: dejavu eval facebook/opt-1.3b --pack my-pack --tasks lambada_openai,piqa -o results

    Example: dejavu eval --mode exact --tasks piqa --data-dir data/eval --limit 200
    """
    chosen = {"mlp_density": mlp_density, "attn_density": attn_density, "kv": kv, "calibration": calibration}
    settings = _settings(mode, pack, quality, policy, weights, chosen)
    engine = {"dtype": dtype, "threads": threads, "backend": backend, "revision": revision}
    documents = {"data_dir": data_dir, "texts": text or (), "num_fewshot": num_fewshot, "limit": limit}
    windows = {"text_tokens": text_tokens, "window": window, "stride": stride}
    run = {"path": path, "batch": batch, "output": output, "overwrite": overwrite, "speed": speed}
    result = _run(model, settings, engine, quantize_embeddings, calibration, tasks, documents | windows, run)
    _show(result, output, as_json, [])


def _settings(
    mode: str, pack: str | None, quality: str | None, policy: str | None, weights: str | None, chosen: dict[str, Any]
) -> list[Setting]:
    """Dense, and beside it what was asked for. chosen: what make_selection takes with a policy."""
    from dejavu.evaluate.settings import Setting

    selection = make_selection(policy, **chosen)
    if pack is not None:
        if policy is not None:
            raise ConfigError("give either --pack or --policy")
        selection = pack_selection(pack, parse_share(quality))
    elif quality is not None:
        raise ConfigError("--quality chooses among a pack's settings: name a --pack")
    if mode == "auto":
        mode = "dense" if selection is None else "sparse"
    name = mode if selection is None else f"pack {pack}"
    if policy is not None:
        name = f"{policy} {selection.mlp_density:g}/{selection.attn_density:g}"
    settings = [Setting("dense", weights=weights)]
    return settings if mode == "dense" and selection is None else [*settings, Setting(mode, selection, weights, name)]


def compare(
    settings: Annotated[
        list[str],
        typer.Argument(help="dense, exact, pack=P[,quality=1%], policy=oracle,mlp=0.1,heads=0.5; with ,weights=int8."),
    ],
    model: Annotated[str | None, typer.Option(help="A folder or hub id. [default: the bundled model]")] = None,
    tasks: Tasks = "",
    text: Text = None,
    data_dir: DataDir = None,
    calibration: CalibrationText = None,
    num_fewshot: Fewshot = None,
    limit: Limit = None,
    text_tokens: TextTokens = None,
    window: Window = None,
    stride: Stride = None,
    path: Scoring = "masked",
    batch: Batch = 1,
    output: Output = None,
    overwrite: Overwrite = False,
    speed: Speed = True,
    dtype: Dtype = "auto",
    quantize_embeddings: QuantizeEmbeddings = False,
    threads: Threads = None,
    backend: Backend = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure several settings over the same documents; the first is what the others are compared with.

    With --output, quality over bytes read is drawn too, unless --no-speed leaves the bytes out.

    Example: dejavu compare dense exact pack=opt-mini pack=opt-mini,quality=20% --text book.txt -o results
    """
    from dejavu.evaluate.settings import parse_setting

    engine = {"dtype": dtype, "threads": threads, "backend": backend, "revision": revision}
    documents = {"data_dir": data_dir, "texts": text or (), "num_fewshot": num_fewshot, "limit": limit}
    windows = {"text_tokens": text_tokens, "window": window, "stride": stride}
    run = {"path": path, "batch": batch, "output": output, "overwrite": overwrite, "speed": speed}
    every = [parse_setting(s) for s in settings]
    drawn = FIGURES if speed else ()
    result = _run(model, every, engine, quantize_embeddings, calibration, tasks, documents | windows, run, drawn)
    figures = []
    if output is not None and speed:
        from dejavu.evaluate.report import save_figure

        figures = save_figure(result, output)
    _show(result, output, as_json, figures)


def _run(
    model: str | None,
    settings: list[Setting],
    engine: dict,
    quantize_embeddings: bool,
    calibration: Path | None,
    tasks: str,
    documents: dict,
    run: dict,
    figures: Sequence[str] = (),
) -> dict:
    """Load what the settings need and evaluate, with a progress bar. Returns: results.json.

    figures: files that the caller will write into the output folder.
    """
    from dejavu import text
    from dejavu.checkpoint.source import BUNDLED
    from dejavu.evaluate.run import RESULT_FILE, Evaluation
    from dejavu.evaluate.scores import SCORES_FILE
    from dejavu.evaluate.settings import identify, make_engines

    name = model or BUNDLED

    def load(weights: str | None):
        embeddings = weights is not None and quantize_embeddings
        return load_engine(name, mode="dense", weights=weights, quantize_embeddings=embeddings, **engine)

    # The place comes first: one that cannot be written, or where another process works, is found before any work.
    if run["output"] is not None:
        check_folder(run["output"], SCORES_FILE, RESULT_FILE, *figures)
    try:
        with nullcontext() if run["output"] is None else locked(run["output"]):
            learned = None if calibration is None else text.beginning([str(calibration)])
            engines = make_engines(settings, load, learned)
            first = next(iter(engines.values()))
            job = Evaluation(first, [task for task in tasks.split(",") if task], **documents)
            made_of = identify(name, first, settings)
            with _progress() as progress:
                return job.run(engines, identity=made_of, progress=progress, **run)
    except KeyboardInterrupt:
        kept = "nothing was kept (give --output)" if run["output"] is None else "the same command goes on from there"
        typer.echo(f"stopped; {kept}", err=True)
        raise typer.Exit(130) from None


def _progress() -> AbstractContextManager[Progress]:
    """Shows how far it is, and the time left, on stderr: a bar, or where it is no terminal a line now and then."""
    from rich.console import Console

    return progress_bar() if Console(stderr=True).is_terminal else nullcontext(_lines())


def _lines() -> Progress:
    started = last = perf_counter()
    first: int | None = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal first, last
        first, now = done if first is None else first, perf_counter()
        if what == "scoring" and done > first and now - last >= LINE_S:
            left = round((now - started) / (done - first) * (total - done))
            typer.echo(f"scored {done:,} of {total:,} tokens, {timedelta(seconds=left)} left", err=True)
            last = now

    return progress


def _show(result: dict, output: Path | None, as_json: bool, figures: list[Path]) -> None:
    if as_json:
        typer.echo(to_json(result))
        return
    from rich.console import Console

    from dejavu.evaluate import report

    out = Console()
    out = out if out.is_terminal else Console(width=WIDTH)
    for table in report.tables(result):
        out.print(table)
    for note in report.notes(result):
        out.print(note, highlight=False)
    if output is not None:
        files = ", ".join(["results.json", *(f.name for f in figures)])
        out.print(f"{output} holds {files}", highlight=False)
