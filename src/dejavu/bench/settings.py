"""What is timed: a subject (a model, or random weights in a shape), and settings of our engine over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dejavu import config as base
from dejavu.bench import shapes
from dejavu.bench.peers import Source
from dejavu.bench.random_predictor import random_predictor
from dejavu.checkpoint.layout import Quantization, parse_quantization, weight_bytes
from dejavu.checkpoint.source import Checkpoint, open_checkpoint
from dejavu.config import Mode, ModelConfig, SelectionConfig
from dejavu.device import parse_dtype
from dejavu.errors import ConfigError
from dejavu.families.load import load_weights
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import RowFormat
from dejavu.model.decoder import Decoder
from dejavu.selection import Cut, Selector, make_selector
from dejavu.selection.fixed import StaticSelector

# Of the weights; a quantised format holds the embeddings and the LM head too, and its cache is bf16.
FORMATS = ("bf16", "fp32", "int8", "int4")


@dataclass(frozen=True)
class Setting(base.Setting):
    """One way to run our engine, and on what.

    Args:
        weights: a format of FORMATS.
        batch: rows, each with a prompt of its own.
        prompt: tokens of each.
        random_predictor: of the selection the densities alone count, and predictors of random weights choose
            (bench.random_predictor).
    Raises: ConfigError naming the field.
    """

    weights: str = "bf16"
    batch: int = 1
    prompt: int = 128
    random_predictor: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.weights not in FORMATS:
            raise ConfigError(f"weights {self.weights!r} are not supported; choose one of: {', '.join(FORMATS)}")
        if self.random_predictor and self.selection is None:
            raise ConfigError("a predictor of random weights needs a selection, whose densities it keeps")
        for name in ("batch", "prompt"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, found {getattr(self, name)}")

    @property
    def policy(self) -> str | None:
        """Who selects, by a name that says so where weights are random."""
        return "random predictor" if self.random_predictor else self.selection and self.selection.policy

    @property
    def name(self) -> str:
        """Unlike that of any other setting, and short enough for a table."""
        parts = [self.mode]
        if s := self.selection:
            parts += [self.policy, f"{_percent(s.mlp_density)}/{_percent(s.attn_density)}", s.kv]
            parts += [] if s.crossover else ["always"]
        return " ".join([*parts, self.weights, f"B{self.batch}", f"P{self.prompt}"])

    def check(self, model: ModelConfig, new_tokens: int = 0) -> None:
        """Raises: ConfigError where the model cannot run this, nor so many tokens behind its prompt."""
        super().check(model)
        need, context = self.prompt + new_tokens, model.context
        if need > context:
            raise ConfigError(
                f"prompt {self.prompt} and {new_tokens} new tokens are {need - context} more than the model's context "
                f"of {context}; shorten them"
            )


def _percent(density: float | tuple[float, ...]) -> str:
    return "by layer" if isinstance(density, tuple) else f"{density:.3g}"


# Of predictors of random weights, as `fit` writes those of a pack.
PREDICTOR_FORMAT = RowFormat.parse("int4")

SelectorFor = Callable[[Decoder, Setting], Selector]


@dataclass(frozen=True)
class Subject:
    """A model and its peers' source. Make one with `model` or `shape`.

    Args:
        about: what a record says of it.
        config: of the decoder.
        source: the same model for the peers.
        decoder: makes ours in a weight format.
        selector: makes the selector of a setting; replace it to time others, predictors of random weights say.
    """

    about: dict[str, Any]
    config: ModelConfig
    source: Source
    decoder: Callable[[str], Decoder]
    selector: SelectorFor = field(default=lambda decoder, setting: policy_selector(decoder, setting))

    @property
    def title(self) -> str:
        return self.about.get("model") or f"{self.about['shape']}, random weights"

    def weight_bytes(self, weights: str) -> int:
        """Memory of our weights in a format."""
        return weight_bytes(self.config, *_format(weights))


def model(name: str, ops: Backend) -> Subject:
    """A checkpoint: a folder, a hub id, or the bundled model. Raises: CheckpointError."""
    checkpoint = open_checkpoint(name)
    return Subject(
        {"model": checkpoint.name, "model_hash": checkpoint.hash},
        shapes.parse(checkpoint.config),
        Source(checkpoint.config, checkpoint.path),
        lambda weights: _load(checkpoint, ops, weights),
    )


def _format(weights: str) -> tuple[torch.dtype, Quantization | None]:
    """The dtype of cache and plain matrices, and how the others are quantised."""
    if weights in ("bf16", "fp32"):
        return parse_dtype(weights), None
    return torch.bfloat16, parse_quantization(weights, embeddings=True)


def _load(checkpoint: Checkpoint, ops: Backend, weights: str) -> Decoder:
    dtype, quantization = _format(weights)
    name = "fp32" if dtype == torch.float32 else "bf16"
    return Decoder(*load_weights(checkpoint, ops=ops, dtype=name, quantization=quantization), ops)


def shape(name: str, ops: Backend, seed: int = 0, activity: float = 0.1) -> Subject:
    """Random weights in a named shape, of which a share `activity` of the neurons fires. Raises: ConfigError.

    Its policy `static` reads random sets that stay, since no text could say which units matter.
    """
    raw = shapes.shape(name)
    config = shapes.parse(raw)
    activity = activity if config.mlp_bias else 0.5

    def decoder(weights: str) -> Decoder:
        dtype, quantization = _format(weights)
        return Decoder(config, shapes.random_weights(config, dtype, ops, seed, activity, quantization), ops)

    about = {"shape": name, "weights": "random", "seed": seed, "activity": activity}
    return Subject(about, config, Source(raw, None, seed), decoder)


def policy_selector(decoder: Decoder, setting: Setting) -> Selector:
    """The policy of a setting; `static` reads `fixed_sets`."""
    if setting.random_predictor:
        return random_predictor(decoder.config, decoder.ops, setting.selection, quantized=PREDICTOR_FORMAT)
    if setting.selection.policy == "static":
        return fixed_sets(decoder.config, decoder.ops, setting.selection, setting.batch)
    return make_selector(setting.selection, decoder.config, decoder.weights, decoder.ops)


def fixed_sets(config: ModelConfig, ops: Backend, selection: SelectionConfig, batch: int = 1) -> StaticSelector:
    """Random units of each layer, the same for all tokens: what reading costs, with no choosing in it.

    With a batch it is the union of a set for each row, drawn independently: the most that a union can be on average.
    """
    generator, importance, cuts = torch.Generator().manual_seed(selection.seed), [], []
    for layer in range(config.num_hidden_layers):
        totals = config.num_attention_heads, config.intermediate_size
        chosen = [torch.zeros(total) for total in totals]
        for mask, k in zip(chosen, selection.counts(layer, config), strict=True):
            for _ in range(batch):
                mask[torch.randperm(mask.numel(), generator=generator)[:k]] = 1
        importance.append(tuple(chosen))
        cuts.append(tuple(None if mask.all() else Cut(int(mask.sum())) for mask in chosen))
    return StaticSelector(cuts, ops, importance, ops.device)


def grid(
    modes: Sequence[Mode],
    selections: Sequence[SelectionConfig],
    weights: Sequence[str],
    batches: Sequence[int],
    prompts: Sequence[int],
    *,
    random_predictor: bool = False,
) -> list[Setting]:
    """Every combination, each once; selections go with mode "sparse" only."""
    every = [
        Setting(mode, selection, form, batch, prompt, random_predictor and mode == "sparse")
        for prompt in prompts
        for batch in batches
        for form in weights
        for mode in modes
        for selection in (selections if mode == "sparse" else (None,))
    ]
    return list(dict.fromkeys(every))
