"""The public object: a loaded model that generates text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Quantization, parse_quantization
from dejavu.checkpoint.source import BUNDLED, Checkpoint, open_checkpoint
from dejavu.config import Mode, ModelConfig, SamplingParams, SelectionConfig, Setting, pack_selection
from dejavu.device import default_threads, require_memory
from dejavu.engine.generation import Batch, Chunk, Generation
from dejavu.engine.prompt import Prompt, split_prompts
from dejavu.engine.step import Steps
from dejavu.engine.tokenizer import Tokenizer
from dejavu.errors import CapacityError, CheckpointError, ConfigError
from dejavu.families import parse
from dejavu.families.load import load_weights
from dejavu.kernels import backend as load_backend
from dejavu.kernels.base import Backend
from dejavu.model.decoder import Decoder
from dejavu.model.hooks import TokenMasks
from dejavu.progress import Progress, silent
from dejavu.selection import Selector, make_selector
from dejavu.selection.oracle import Importance
from dejavu.selection.pack import check_pack, load_pack

# Caches are made in multiples of this many tokens, so that requests of like length share one.
CACHE_STEP = 256
# Characters for each token of the context, more than text has: a longer prompt is judged by its beginning first.
BEGINNING = 16

# Tokens of a calibration text that the static policy looks at: sets of hot neurons settle within a few hundred.
CALIBRATION_TOKENS = 1024
_CHARS = 16  # of the text are looked at for each of them: a token of text has four or five


class Engine:
    """A model ready to generate. Make one with `dejavu.load`.

    Calls may interleave: a stream that is not finished keeps its own cache.

    Args:
        decoder: the model.
        tokenizer: of the same checkpoint.
        mode: "dense", "exact", "sparse", or "auto": sparse with a selection, else exact where the activation allows it.
        selection: what the sparse mode reads; only that mode takes one.
        calibration: text from which the static policy learns which units matter.
        checkpoint: where the model came from; a pack is checked against its hash.
    Raises: ConfigError for a mode that the model does not support, or that does not go with the selection.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        mode: Mode | Literal["auto"] = "auto",
        selection: SelectionConfig | None = None,
        calibration: str | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        if calibration is not None and (selection is None or selection.policy != "static"):
            raise ConfigError("a calibration text goes with a selection of policy static")
        self.decoder, self.tokenizer, self.checkpoint = decoder, tokenizer, checkpoint
        self._setting = Setting.choose(mode, selection, decoder.config)
        self._selector = None if selection is None else self._make_selector(selection, calibration)
        self._idle: list[Steps] = []  # the last steps made, while nothing uses them

    @classmethod
    def load(
        cls,
        model: str | PathLike = BUNDLED,
        *,
        dtype: str = "auto",
        weights: str | None = None,
        quantize_embeddings: bool = False,
        mode: Mode | Literal["auto"] = "auto",
        selection: SelectionConfig | None = None,
        calibration: str | None = None,
        pack: str | PathLike | None = None,
        quality: float | None = None,
        threads: int | None = None,
        backend: str = "auto",
        revision: str | None = None,
        progress: Progress = silent,
    ) -> Engine:
        """Load a model.

        Args:
            model: a local folder, an id on the Hugging Face Hub, or "opt-mini", the bundled model.
            dtype: of the weights: "fp32", "bf16", "fp16", or "auto": as stored.
            weights: quantise all matrices while loading: "int8", "int4", or "int4-g32", "int4-g128z" and so on, by the
                size of a group and with z for a zero point; None: keep them in `dtype`, which the cache has anyway.
            quantize_embeddings: the embeddings and the LM head too.
            mode, selection, calibration: what is read for each token; see Engine.
            pack, quality: short for SelectionConfig("predictor", pack=pack, quality=quality, kv="lazy").
            threads: CPU threads of the whole process; None: all that it may use.
            backend: of the kernels: "cpu", "triton", "reference", or "auto": triton where there is an NVIDIA GPU.
            revision: branch, tag or commit of a hub id.
            progress: told while weights are read, in bytes.
        Raises: CheckpointError, ConfigError.
        """
        if pack is not None:
            if selection is not None:
                raise ConfigError("give either a pack or a selection")
            selection = pack_selection(str(pack), quality)
        elif quality is not None:
            raise ConfigError("quality chooses among a pack's settings: name a pack")
        quantization = parse_quantization(weights, quantize_embeddings)
        ops = load_backend(backend)
        set_threads(ops, threads)
        checkpoint = open_checkpoint(model, revision=revision)
        # What can fail fast comes before the weights, which may take minutes.
        config = parse(checkpoint.config)
        mode, tokenizer = Setting.choose(mode, selection, config).mode, Tokenizer(checkpoint.path, config)
        settings = {"ops": ops, "dtype": dtype, "quantization": quantization, "progress": progress}
        config, loaded = load_weights(checkpoint, **settings)
        return cls(Decoder(config, loaded, ops), tokenizer, mode, selection, calibration, checkpoint)

    @property
    def mode(self) -> Mode:
        return self._setting.mode

    @property
    def selection(self) -> SelectionConfig | None:
        """What the mode sparse reads."""
        return self._setting.selection

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def selector(self) -> Selector | None:
        """Who chooses in mode sparse."""
        return self._selector

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as loaded; where they are quantised, of the cache."""
        return self.decoder.weights.dtype

    @property
    def quantization(self) -> Quantization | None:
        """Of the weights as loaded; None: they are plain."""
        return self.decoder.weights.quantization

    def with_mode(self, mode: Mode, selection: SelectionConfig | None = None, calibration: str | None = None) -> Engine:
        """An engine over the same weights that runs in another mode. Raises: ConfigError as the class does."""
        return Engine(self.decoder, self.tokenizer, mode, selection, calibration, self.checkpoint)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **sampling
    ) -> Generation | list[Generation]:
        """Continue one prompt, or a batch of prompts of any lengths.

        Args:
            prompt: text, or token ids taken as they are; or several such prompts (engine.prompt).
            params: how to choose tokens; `sampling` overrides fields of it by name.
        Returns: a Generation, or for a list of prompts a list of them in the same order.
        Raises: ConfigError for a prompt or setting that makes no sense; CapacityError for a prompt longer than the
            context. Generation that reaches the end of the context finishes with "length".
        """
        prompts, single = split_prompts(prompt)
        done = {chunk.row: chunk.generation for chunk in self.stream(prompts, params, **sampling) if chunk.generation}
        return done[0] if single else [done[row] for row in sorted(done)]

    def stream(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **sampling
    ) -> Iterator[Chunk]:
        """As `generate`, a chunk for each token as it comes; `chunk.text` may be shown at once.

        Bad arguments raise here, before the first chunk is asked for.
        """
        started = perf_counter()
        params = replace(params or SamplingParams(), **sampling)
        prompts = [self._prompt_ids(p) for p in split_prompts(prompt)[0]]
        self._require_one_stretch(prompts, params.max_new_tokens)
        return self._run(prompts, params, started)

    def logits(self, prompt: Prompt) -> Tensor:
        """The logits (T, V) float32 of every position of a prompt: text, or token ids taken as they are.

        In mode sparse every token reads only its own selection (model.hooks.TokenMasks).
        Raises: ConfigError, CapacityError as `generate` does.
        """
        prompts, single = split_prompts(prompt)
        if not single:
            raise ConfigError(f"logits are of one prompt, found a list of {len(prompts)}")
        ids = self._prompt_ids(prompts[0])
        # Pieces of a prompt are put together at the end.
        size = 2 * 4 * len(ids) * self.config.vocab_size
        require_memory(size, self.decoder.device, f"logits of {len(ids):,} tokens", "ask for a shorter prompt")
        hooks = None if self._selector is None else TokenMasks(self._selector)
        cache = self.decoder.new_cache(1, len(ids))
        return self.decoder.prefill(torch.tensor(ids), cache, all_logits=True, hooks=hooks).cpu()

    def new_steps(self, rows: int, capacity: int, *, crossover: bool = True) -> Steps:
        """The engine's decode steps over a cache of their own, of `rows` rows of `capacity` tokens.

        Args:
            crossover: False obeys selections even where reading all would be faster; True leaves it to the selection.
        """
        cache = self.decoder.new_cache(rows, capacity, self._setting.pending)
        crossover = crossover and self.selection is not None and self.selection.crossover
        return Steps(self.decoder, cache, self.mode, self._selector, crossover=crossover)

    def _run(self, prompts: list[list[int]], params: SamplingParams, started: float) -> Iterator[Chunk]:
        context, stretch = self._context, self.config.stretch
        need = min(context, max(map(len, prompts)) + params.max_new_tokens - 1)
        capacity = min(context, -(-need // CACHE_STEP) * CACHE_STEP)
        if stretch(capacity) != stretch(need):  # room that a text never uses may not change its angles
            capacity = need
        try:
            steps = self._idle.pop()
        except IndexError:  # none, or another thread was faster
            steps = None
        if steps is None or steps.cache.rows < len(prompts) or steps.cache.capacity != capacity:
            steps = None  # given back before the new ones take memory
            steps = self.new_steps(len(prompts), capacity)
        try:
            yield from Batch(self.decoder, self.tokenizer, steps, prompts, params, started).chunks()
        finally:
            self._idle[:] = [steps]

    def _require_one_stretch(self, prompts: list[list[int]], new: int) -> None:
        """Raises: ConfigError for rows that this kind of rotary positions turns by different angles."""
        lengths = [min(self._context, len(ids) + new - 1) for ids in prompts]
        if len({self.config.stretch(length) for length in lengths}) > 1:
            raise ConfigError(
                f"rope_type {self.config.rope.kind} chooses its angles by the length of the text, and rows of a batch "
                f"share them: these texts may have {min(lengths)} to {max(lengths)} tokens; generate them one at a time"
            )

    def _make_selector(self, selection: SelectionConfig, calibration: str | None) -> Selector:
        d = self.decoder
        if selection.pack is not None:
            assert self.checkpoint is not None, "a pack is checked against a checkpoint"
            pack = load_pack(selection.pack, device=d.device)
            check_pack(pack, selection.pack, d.config, self.checkpoint)
            return pack.selector(d.config, d.ops, selection.quality)
        importance = None
        if calibration is not None:
            watch = Importance(d.config, d.weights, d.ops)
            tokens = min(CALIBRATION_TOKENS, self._context)
            ids = self._prompt_ids(self.tokenizer.encode(calibration[: tokens * _CHARS])[:tokens])
            # The watcher scores nothing, so that masks keep everything: one pass instead of a step a token.
            d.prefill(torch.tensor(ids), d.new_cache(1, len(ids)), hooks=TokenMasks(watch))
            importance = watch.total
        return make_selector(selection, d.config, d.weights, d.ops, importance=importance)

    @property
    def _context(self) -> int:
        return self.config.context

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        V, context = self.config.vocab_size, self._context
        text = isinstance(prompt, str)
        if text and len(prompt) > (most := BEGINNING * context):  # a huge one: minutes would go by over all of it
            self._require_context(self.tokenizer.encode(prompt[:most]), f"the beginning of {most:,} characters alone")
        ids = self.tokenizer.encode(prompt) if text else prompt
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        bad = next((i for i in ids if not 0 <= i < V), None)
        if bad is not None and text:
            raise CheckpointError(f"the tokenizer gives token {bad}, but the model has only {V}: they do not match")
        if bad is not None:
            raise ConfigError(f"token ids must be integers in [0, {V}), found {bad!r}")
        self._require_context(ids, "it")
        return ids

    def _require_context(self, ids: Sequence[int], what: str) -> None:
        if len(ids) > self._context:
            raise CapacityError(
                f"the prompt is too long: {what} has {len(ids)} tokens, {len(ids) - self._context} more than the "
                f"model's context of {self._context}; shorten it"
            )


def set_threads(ops: Backend, threads: int | None) -> None:
    """Of a backend and of PyTorch; None: all that the process may use. Raises: as Backend.set_threads."""
    ops.set_threads(default_threads() if threads is None else threads)
