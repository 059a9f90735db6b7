"""The whole job: text through the model, statistics, perplexities, files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from dejavu.artifacts import resumable, write_json
from dejavu.engine.engine import Engine
from dejavu.errors import ConfigError
from dejavu.profile import quality
from dejavu.profile.attention import Sentence, read_sentence
from dejavu.profile.observer import Observer, Statistics
from dejavu.profile.settings import ProfileConfig
from dejavu.profile.state import STATE_FILE, State
from dejavu.profile.summary import summarise
from dejavu.profile.windows import windows
from dejavu.progress import Progress, silent
from dejavu.text import documents

RESULT_FILE = "profile.json"
# The state is written after this many windows: what a stopped run loses at most.
SAVE_EVERY = 8


def profile(
    engine: Engine,
    sources: Sequence[str],
    out: Path,
    settings: ProfileConfig,
    *,
    name: str,
    checkpoint_hash: str,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict:
    """Watch a model on text and write profile.json, figures and a page into a folder.

    Stopped at any time, it goes on from its last saved state when called again with the same arguments.

    Args:
        engine: on the CPU; its mode does not matter.
        sources: of text; see dejavu.text.documents. Read in order, and no further than needed.
        name: what the model is called in the results.
        checkpoint_hash: of the model's checkpoint (Checkpoint.hash).
        overwrite: start anew in a folder that holds something else.
    Returns: what profile.json holds; see docs/profile.md.
    Raises: ConfigError for settings that don't fit the model, for a text that is missing or too short, and for a
        folder that cannot be written or holds another profile.
    """
    started, decoder = perf_counter(), engine.decoder
    settings.check(decoder.config)
    sentence = _sentence(engine, settings.sentence)
    identity = _identity(engine, settings, name, checkpoint_hash)
    state = State(identity, Statistics.empty(decoder.config, len(settings.errors)))
    resumable(out, STATE_FILE, "profile", overwrite=overwrite)
    if not state.resume(out):
        state.save(out)  # see that it can be, before anything long begins
    before = state.seconds

    def save() -> None:
        state.seconds = before + perf_counter() - started
        state.save(out)

    held = _watch(engine, sources, settings, state, save, progress)
    if held:
        todo = quality.points(settings, decoder.config)
        contribution = state.statistics.contribution
        importance = list(zip(contribution.heads, contribution.neurons, strict=True))
        for done, point in enumerate(todo):
            progress("perplexity", done, len(todo))
            if point.name not in state.perplexity:
                state.perplexity[point.name] = quality.measure(point, decoder, held, importance, settings.seed)
                save()
        progress("perplexity", len(todo), len(todo))
    save()
    result = summarise(state, decoder.config, settings, sentence, list(sources))

    write_json(out / RESULT_FILE, result)
    from dejavu.profile.page import write_page  # matplotlib takes a second to import

    write_page(result, out)
    return result


def _identity(engine: Engine, settings: ProfileConfig, name: str, checkpoint_hash: str) -> dict:
    """What a profile is of, as JSON would give it back, so that it compares equal."""
    dtype = str(engine.dtype).removeprefix("torch.")
    identity = {"model": name, "checkpoint_hash": checkpoint_hash, "dtype": dtype, **asdict(settings)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in identity.items()}


def _watch(
    engine: Engine,
    sources: Sequence[str],
    settings: ProfileConfig,
    state: State,
    save: Callable[[], None],
    progress: Progress,
) -> list[list[int]]:
    """Feed the statistics with the windows not watched yet; returns the held windows, which come first."""
    decoder, tokenizer = engine.decoder, engine.tokenizer
    size, want = settings.window, settings.tokens // settings.window
    observer = Observer(decoder.config, decoder.weights, settings, state.statistics)
    cache = decoder.new_cache(1, size)
    held, hold, digest, seen = [], settings.quality_tokens // size, hashlib.sha256(), 0
    for ids in windows(documents(sources), tokenizer.encode, size, tokenizer.bos_id):
        digest.update(np.array(ids, dtype="<i4").tobytes())
        if len(held) < hold:
            held.append(ids)
            continue
        seen += 1
        if seen <= state.windows:
            if seen == state.windows and digest.hexdigest() != state.digest:
                raise ConfigError("the text is not the one this profile began with; give that one, or --overwrite")
        else:
            observer.at(seen, size)
            cache.truncate(0, 0)
            decoder.prefill(torch.tensor(ids), cache, hooks=observer)
            state.windows, state.digest = seen, digest.hexdigest()
            if seen % SAVE_EVERY == 0:
                save()
        progress("text", seen * size, want * size)
        if seen == want:
            break
    if seen == 0 or seen < state.windows:
        have = (len(held) + seen) * size
        raise ConfigError(
            f"the text has fewer than {have + size} tokens, but {(hold + max(1, state.windows)) * size} are needed: "
            f"{hold} windows for perplexity (quality_tokens) and at least one to watch, {size} tokens each (window); "
            "give more text, or lower these"
        )
    return held


def _sentence(engine: Engine, text: str) -> Sentence:
    ids = engine.tokenizer.encode(text)
    return read_sentence(engine.decoder, ids, [engine.tokenizer.decode([i]) or "<s>" for i in ids])
