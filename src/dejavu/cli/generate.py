"""`dejavu generate`: continue a prompt."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.artifacts import atomic_write, to_json
from dejavu.cli.options import (
    AttnDensity,
    Backend,
    Calibration,
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
    stats_table,
)
from dejavu.config import SamplingParams, parse_share
from dejavu.errors import CapacityError, ConfigError

DEFAULT = SamplingParams()
# Of a calibration text: far more than the static policy looks at.
CALIBRATION_BYTES = 1 << 20
# Of a prompt: more than the longest context holds.
PROMPT_BYTES = 64 << 20
# How the hub writes a model's name.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


# Options that Engine.load takes by the same names.
_LOADED = ("mode", "pack", "dtype", "weights", "quantize_embeddings", "threads", "backend", "revision")

Model = Annotated[str | None, typer.Argument(help="A folder or hub id. [default: the bundled model]")]
PromptText = Annotated[str | None, typer.Argument(help="The text to continue; - reads it from stdin.")]
PromptFile = Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 file.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file, whole or not at all.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")]
TopP = Annotated[float, typer.Option(help="Sample among the fewest tokens that reach this sum.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that occurred become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.")]
Logprobs = Annotated[
    int | None, typer.Option(help="With --json: log-probabilities, and this many alternatives a token.")
]
ShowStats = Annotated[bool, typer.Option("--stats", help="Show times, bytes read and densities on stderr.")]


def generate(
    model: Model = None,
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    output: Output = None,
    max_new_tokens: MaxNewTokens = DEFAULT.max_new_tokens,
    temperature: Temperature = DEFAULT.temperature,
    top_k: TopK = DEFAULT.top_k,
    top_p: TopP = DEFAULT.top_p,
    min_p: MinP = DEFAULT.min_p,
    repetition_penalty: RepetitionPenalty = DEFAULT.repetition_penalty,
    seed: Seed = DEFAULT.seed,
    stop: Stop = None,
    ignore_eos: IgnoreEos = DEFAULT.ignore_eos,
    logprobs: Logprobs = DEFAULT.logprobs,
    mode: Mode = "auto",
    pack: Pack = None,
    quality: Quality = None,
    policy: Policy = None,
    mlp_density: MlpDensity = None,
    attn_density: AttnDensity = None,
    kv: Kv = None,
    calibration: Calibration = None,
    dtype: Dtype = "auto",
    weights: WeightsFormat = None,
    quantize_embeddings: QuantizeEmbeddings = False,
    threads: Threads = None,
    backend: Backend = "auto",
    revision: Revision = None,
    stats: ShowStats = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text comes on stdout as it is made.

    Example: dejavu generate "The old house on the hill" -n 50 --stats

    Example: dejavu generate opt-mini "The old house" --pack opt-mini --stats

    Example: dejavu generate "The old house" --policy oracle --mlp-density 0.1 --stats

    Example: dejavu generate facebook/opt-1.3b - --temperature 0.8 --seed 1 < prompt.txt
    """
    given = locals()  # all options, before anything is added to them
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs shows only with --json")
    if prompt_file is None and prompt is None:
        model, prompt = _sole_word(model)
    prompt = _read_prompt(prompt, prompt_file)
    sampling = {field.name: given[field.name] for field in fields(SamplingParams)}
    _run(model, prompt, SamplingParams(**sampling | {"stop": tuple(stop or ())}), given)


def _run(model: str | None, prompt: str, params: SamplingParams, given: dict[str, Any]) -> None:
    """Load, and write the text as it comes. given: what `generate` was given, by its names."""
    from dejavu.checkpoint.source import BUNDLED

    output, as_json, calibration = given["output"], given["as_json"], given["calibration"]
    densities = {name: given[name] for name in ("mlp_density", "attn_density", "kv")}
    selection = make_selection(given["policy"], calibration=calibration, **densities)
    settings = {name: given[name] for name in _LOADED} | {"quality": parse_share(given["quality"])}
    if output is not None and output.is_dir():
        raise ConfigError(f"{output}: is a folder; name a file to write")
    # The output is opened first: a place that cannot be written is found before anything long begins.
    with nullcontext(sys.stdout) if output is None else atomic_write(output) as out:
        engine = load_engine(
            model or BUNDLED,
            selection=selection,
            calibration=None if calibration is None else _read_beginning(calibration),
            **settings,
        )
        result = None
        try:
            for chunk in engine.stream(prompt, params):
                result = chunk.generation
                if not as_json:
                    out.write(chunk.text)
                    out.flush()
        except KeyboardInterrupt:
            pass  # what came so far stays
        if not as_json:
            out.write("\n")
        elif result is not None:
            record = {"model": model or BUNDLED, "mode": engine.mode, "dtype": str(engine.dtype).removeprefix("torch.")}
            out.write(to_json(record | {"prompt": prompt} | result.to_dict()) + "\n")
    if result is None:
        raise typer.Exit(130)
    if given["stats"]:
        from rich.console import Console

        Console(stderr=True).print(stats_table({engine.mode: result.stats}))


def _sole_word(word: str | None) -> tuple[str | None, str | None]:
    """Model and prompt, where one word was given for both: it is the prompt, unless it names a model and the prompt
    comes through a pipe. Raises: typer.BadParameter for a model's folder without a prompt."""
    from dejavu.checkpoint.source import BUNDLED, CONFIG

    # os.path, since pathlib raises for a prompt too long for a name, or one that begins with ~.
    folder = word is not None and os.path.isfile(os.path.join(os.path.expanduser(word), CONFIG))
    if folder or word == BUNDLED or HUB_ID.fullmatch(word or ""):
        piped = None if sys.stdin.isatty() else _piped()
        if piped:
            return word, piped
        if folder:
            raise typer.BadParameter(f"{word} is a model's folder: give a PROMPT after it, or pipe one in")
    return None, word


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt_file is not None:
        if prompt is not None:
            raise typer.BadParameter("give either PROMPT or --prompt-file")
        prompt = _whole(_read(prompt_file, PROMPT_BYTES + 1), str(prompt_file))
    elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = _piped()
    elif prompt is None:
        raise typer.BadParameter("give a PROMPT, or - to read it from stdin")
    return prompt


def _piped() -> str:
    return _whole(sys.stdin.buffer.read(PROMPT_BYTES + 1), "stdin")


def _whole(data: bytes, source: str) -> str:
    """The text of a prompt, all of it. Raises: CapacityError where there is more than PROMPT_BYTES."""
    if len(data) > PROMPT_BYTES:
        raise CapacityError(f"{source}: more than {PROMPT_BYTES >> 20} MiB, longer than any context; shorten it")
    return _text(data, source)


def _read_beginning(path: Path) -> str:
    """The text of a file's first CALIBRATION_BYTES."""
    data = _read(path, CALIBRATION_BYTES + 1)
    # A character cut in two is left out: of its 4 bytes at most, the first alone does not begin with the bits 10.
    for end in range(CALIBRATION_BYTES, CALIBRATION_BYTES - 4, -1) if len(data) > CALIBRATION_BYTES else ():
        if data[end] & 0xC0 != 0x80:
            data = data[:end]
            break
    return _text(data, str(path))


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a text file") from error


def _text(data: bytes, source: str) -> str:
    """UTF-8 text without a byte order mark, and without the newline that ends its last line."""
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at offset {error.start}; convert it"
        ) from error
