"""What a task of the harness says about generating, as our sampling parameters: with the meaning of its own Hugging
Face model, and nothing dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dejavu.artifacts import read_json
from dejavu.config import SamplingParams
from dejavu.errors import CheckpointError, ConfigError

MAX_NEW_TOKENS = 256  # where a task names no limit; the harness's own default
# Of several names for one limit the harness obeys the first.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Where neither the task nor the checkpoint says it, Hugging Face draws from the 50 likeliest tokens.
DEFAULTS = {"top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# Settings of Hugging Face that change nothing at these values; None: whatever they are.
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1, "typical_p": 1,
    "early_stopping": False, "use_cache": None, "pad_token_id": None, "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "diversity_penalty": 0, "min_length": 0,
    "min_new_tokens": 0, "penalty_alpha": 0, "guidance_scale": 1,
}  # fmt: skip


def checkpoint_defaults(folder: Path) -> dict[str, Any]:
    """What holds where a task says nothing: the checkpoint's generation_config.json, then DEFAULTS."""
    file = folder / "generation_config.json"
    own = read_json(file, CheckpointError) if file.is_file() else {}
    return DEFAULTS | {name: own[name] for name in DEFAULTS if own.get(name) is not None}


def sampling(settings: Mapping[str, Any], defaults: Mapping[str, Any], end: str, seed: int = 0) -> SamplingParams:
    """Sampling parameters of one request; `max_length`, which counts the prompt, is left to `fit`.

    Args:
        settings: as the task gives them.
        defaults: see `checkpoint_defaults`.
        end: the text of the token that ends a document, at which generation stops however it is spelled.
        seed: added to that of the settings.
    Raises: ConfigError naming a setting that is not supported, or whose value makes no sense.
    """
    left = {name: value for name, value in settings.items() if value is not None}
    until = left.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    limit = next((left[name] for name in LIMITS if name in left), MAX_NEW_TOKENS)
    # The harness's own model finds an empty string in the first token that it makes.
    new = 1 if "" in until else _number("the number of new tokens", limit, int)
    temperature = _number("temperature", left.pop("temperature", 0), float)
    sampled = left.pop("do_sample", temperature > 0)
    if not isinstance(sampled, bool):
        raise ConfigError(f"do_sample must be true or false, found {sampled!r}")
    if sampled and temperature == 0:
        raise ConfigError("do_sample needs a temperature above 0; give one, or do_sample=False")
    values = {name: left.pop(name, default) for name, default in defaults.items()}
    params = SamplingParams(
        max_new_tokens=new,
        stop=tuple(dict.fromkeys(s for s in [*until, end] if s)),
        seed=_number("seed", left.pop("seed", 0), int) + seed,
        repetition_penalty=_number("repetition_penalty", values["repetition_penalty"], float),
    )
    for name in (*LIMITS, "max_length"):
        left.pop(name, None)
    for name, value in left.items():
        if name not in NEUTRAL or NEUTRAL[name] not in (None, value):
            raise ConfigError(
                f"generation setting {name}={value!r} is not supported; supported: until, do_sample, temperature, "
                f"{', '.join([*DEFAULTS, 'seed', *LIMITS, 'max_length'])}"
            )
    if not sampled:
        return params  # greedy choice has no use for filters, which Hugging Face leaves out
    return replace(
        params,
        temperature=temperature,
        top_k=_number("top_k", values["top_k"], int) or None,
        top_p=_number("top_p", values["top_p"], float),
        min_p=_number("min_p", values["min_p"], float),
    )


def fit(params: SamplingParams, settings: Mapping[str, Any], ids: list[int], context: int) -> tuple[list[int], int]:
    """The prompt's last tokens that leave room for the new ones, and how many new ones there are.

    Raises: ConfigError where no room is left for a prompt, or `max_length` leaves none for new tokens.
    """
    new = params.max_new_tokens
    if new >= context:
        raise ConfigError(f"max_gen_toks {new} leaves no room for a prompt: the context is {context}")
    ids = ids[-(context - new) :]
    if (length := settings.get("max_length")) is not None:
        new = _number("max_length", length, int) - len(ids)
        if new < 1:
            raise ConfigError(f"max_length {length} leaves no room for new tokens after a prompt of {len(ids)} tokens")
    return ids, new


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """The value as `kind`. Raises: ConfigError for what is no such number."""
    try:
        if isinstance(value, bool) or kind(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"{name} must be {what}, found {value!r}") from error
