"""Frozen, validated configurations. Sizes come from a checkpoint's config.json only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

from dejavu.errors import ConfigError

Mode = Literal["dense", "exact", "sparse"]
Policy = Literal["predictor", "oracle", "static", "non_contextual", "random", "nearest", "signs"]

# Activations whose output is exactly zero on a half line: only these allow the exact mode.
ZEROING_ACTIVATIONS = ("relu", "fatrelu")
ACTIVATIONS = (*ZEROING_ACTIVATIONS, "silu", "gelu", "gelu_tanh")
# Of residual streams; "none" is a copy.
NORMS = ("none", "layer", "rms")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `scaling` holds the parameters of the published kind, by their config.json names."""

    theta: float = 10_000.0
    kind: str = "default"
    scaling: dict = field(default_factory=dict, hash=False)

    def context(self, max_position_embeddings: int) -> int:
        """Positions that the model may have: config.json keeps the shorter context of before where it was stretched."""
        if self.kind in ("linear", "dynamic"):
            return max(max_position_embeddings, int(max_position_embeddings * self.scaling["factor"]))
        if self.kind == "yarn" and self.scaling.get("factor") is not None:
            original = self.scaling["original_max_position_embeddings"]
            return max(max_position_embeddings, int(original * self.scaling["factor"]))
        return max_position_embeddings

    def stretch(self, length: int, max_position_embeddings: int) -> float:
        """See ModelConfig.stretch."""
        if self.kind == "dynamic":
            return max(length, max_position_embeddings)
        return float(self.kind == "longrope" and length > self.scaling["original_max_position_embeddings"])


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder needs to know of an architecture; a family file builds it from config.json.

    Sizes use Hugging Face's names. `embed_size` is the width of the token embeddings where it differs
    from `hidden_size` (OPT-350m projects in and out). `norm_before` is pre-norm; `final_norm` says
    whether a norm stands before the LM head. `gated` MLPs have gate, up and down rows; with
    `activate_up` the activation is applied to up as well (Bamboo's dReLU). `activation_threshold` is
    FATReLU's: values at or below it become zero. `rope` is None for learned positions, which are
    looked up at `position + position_offset`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    activation: str
    activation_threshold: float = 0.0
    gated: bool = False
    activate_up: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_before: bool = True
    norm_affine: bool = True
    final_norm: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig | None = None
    position_offset: int = 0
    sliding_window: int | None = None
    embed_size: int | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "max_position_embeddings"),
        ):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**48:
                raise ConfigError(f"config: {name} must be a positive integer below 2^48, found {value!r}")
        for name, low, high in (("norm_eps", 0, 1), ("activation_threshold", 0, 1e30)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"config: {name} must be in [{low}, {high:g}], found {value!r}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"config: sliding_window must be a positive integer or null, found {self.sliding_window!r}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"config: activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        if self.embed_size is None:
            object.__setattr__(self, "embed_size", self.hidden_size)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def context(self) -> int:
        """Tokens that a text may have: `max_position_embeddings`, which some rotary kinds stretch by their factor."""
        return self.max_position_embeddings if self.rope is None else self.rope.context(self.max_position_embeddings)

    def stretch(self, length: int) -> float:
        """The same for texts that rotary positions turn by the same angles; most kinds turn all texts alike."""
        return 0.0 if self.rope is None else self.rope.stretch(length, self.max_position_embeddings)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes this architecture supports: exact needs an activation that is exactly zero."""
        return ("dense", "exact", "sparse") if self.activation in ZEROING_ACTIVATIONS else ("dense", "sparse")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when to stop.

    Args:
        max_new_tokens: at most this many; fewer where the context ends first.
        temperature: 0 always takes the most likely token (greedy), and so does any that is close to it.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        min_p: drop tokens less likely than this fraction of the most likely one.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely; in [0.01, 100].
        seed: makes sampling repeatable; every prompt of a batch starts from it.
        stop: the text ends before the first of these strings.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: log-probabilities of each chosen token and of this many most likely ones (0: the chosen one alone),
            under the model's own distribution, before temperature, penalty and filters.
    Raises: ConfigError naming the field.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

        def check(name: str, good: bool, expected: str):
            if not good:
                raise ConfigError(f"{name} must be {expected}, found {getattr(self, name)!r}")

        def number(name: str, good: Callable[[float], bool], expected: str):
            value = getattr(self, name)
            real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            check(name, real and good(value), expected)

        def integer(name: str, low: int, high: int, expected: str):
            value = getattr(self, name)
            check(name, type(value) is int and low <= value < high, expected)

        integer("max_new_tokens", 1, 2**31, "a positive integer")
        number("temperature", lambda x: x >= 0, "a number of at least 0")
        if self.top_k is not None:
            integer("top_k", 1, 2**31, "a positive integer")
        number("top_p", lambda x: 0 < x <= 1, "in (0, 1]")
        number("min_p", lambda x: 0 <= x <= 1, "in [0, 1]")
        # Beyond, products with logits overflow; 1.0 to 1.5 is what people use.
        number("repetition_penalty", lambda x: 0.01 <= x <= 100, "a number in [0.01, 100]")
        if self.seed is not None:
            integer("seed", 0, 2**63, "an integer in [0, 2^63)")
        check("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty")
        if self.logprobs is not None:
            integer("logprobs", 0, 2**31, "an integer of at least 0")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0):
            raise ConfigError("top_k, top_p and min_p need a temperature above 0: at 0 the likeliest token is taken")


@dataclass(frozen=True)
class SelectionConfig:
    """What the sparse mode reads. Densities are fractions kept, for all layers or one a layer.

    Args:
        policy: who chooses; see dejavu.selection.
        pack: for "predictor", and only there: the folder or hub id of a sparsity pack, which sets the densities.
        quality: of a pack's settings take the cheapest whose perplexity rose by at most this (0.01: one percent);
            None: the setting that the pack was fitted for.
        mlp_density: of each layer's neurons, in (0, 1]; 1 reads all.
        attn_density: of each layer's query heads, in (0, 1]; 1 reads all.
        dense_layers: layers that read everything.
        kv: "lazy" computes keys and values of a head when it is next selected, "full" at once. Same result.
        pending: with lazy keys and values, at most this many tokens wait in a head.
        seed: of the random policy.
        crossover: in a batch, read a part of a layer whole where that was measured to be faster than the union of what
            its rows select (engine.crossover).
    Raises: ConfigError naming the field.
    """

    policy: Policy = "oracle"
    mlp_density: float | tuple[float, ...] = 1.0
    attn_density: float | tuple[float, ...] = 1.0
    dense_layers: tuple[int, ...] = ()
    kv: Literal["lazy", "full"] = "full"
    pending: int = 64
    seed: int = 0
    pack: str | None = None
    quality: float | None = None
    crossover: bool = True

    def __post_init__(self):
        if self.policy not in get_args(Policy):
            raise ConfigError(f"policy {self.policy!r} does not exist; choose one of: {', '.join(get_args(Policy))}")
        for name in ("mlp_density", "attn_density"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= 1 for v in values):
                raise ConfigError(f"{name} must be in (0, 1], found {value!r}")
        if self.kv not in ("lazy", "full"):
            raise ConfigError(f'kv must be "lazy" or "full", found {self.kv!r}')
        if type(self.pending) is not int or self.pending < 1:
            raise ConfigError(f"pending must be a positive integer, found {self.pending!r}")
        if (self.policy == "predictor") != (self.pack is not None):
            raise ConfigError("policy predictor needs a pack, and no other policy takes one")
        if self.pack is not None and (self.mlp_density, self.attn_density, self.dense_layers) != (1, 1, ()):
            raise ConfigError("a pack sets the densities: choose a quality instead")
        if self.quality is not None and (self.pack is None or not self.quality >= 0):
            raise ConfigError(f"quality is a pack's, and a number of at least 0, found {self.quality!r}")

    def counts(self, layer: int, config: ModelConfig) -> tuple[int, int]:
        """Heads and neurons that one layer keeps (rounded up), of H and I.

        Raises: ConfigError where densities or dense layers don't fit the model's number of layers.
        """
        L = config.num_hidden_layers
        if bad := [i for i in self.dense_layers if not 0 <= i < L]:
            raise ConfigError(f"dense_layers: the model has layers 0 to {L - 1}, found {bad[0]}")

        def keep(name: str, total: int) -> int:
            density = getattr(self, name)
            if isinstance(density, tuple) and len(density) != L:
                raise ConfigError(f"{name}: the model has {L} layers, found {len(density)} densities")
            density = density[layer] if isinstance(density, tuple) else density
            return total if layer in self.dense_layers else math.ceil(round(density * total, 6))

        return keep("attn_density", config.num_attention_heads), keep("mlp_density", config.intermediate_size)


def pack_selection(pack: str, quality: float | None = None) -> SelectionConfig:
    """What a sparsity pack selects; keys and values are lazy, as packs are fitted for."""
    return SelectionConfig("predictor", pack=pack, quality=quality, kv="lazy")


@dataclass(frozen=True)
class Setting:
    """One way to run a model.

    Args:
        mode, selection: what is read; mode "sparse" has a selection, and no other mode.
        weights: a format to quantise to, int8 or int4-g32 say; None: as stored.
    Raises: ConfigError for a mode that does not exist, or that does not go with the selection.
    """

    mode: Mode = "dense"
    selection: SelectionConfig | None = None
    weights: str | None = None

    def __post_init__(self):
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode {self.mode!r} does not exist; choose one of: auto, {', '.join(get_args(Mode))}")
        if (self.mode == "sparse") != (self.selection is not None):
            raise ConfigError("mode sparse needs a selection (a pack or a policy), and no other mode takes one")

    @classmethod
    def choose(cls, mode: Mode | Literal["auto"], selection: SelectionConfig | None, config: ModelConfig) -> Self:
        """That of a model. "auto" is sparse with a selection, else exact where the activation allows it.

        Raises: ConfigError as the class and `check` do.
        """
        if mode == "auto":
            mode = "sparse" if selection is not None else "exact" if "exact" in config.modes else "dense"
        setting = cls(mode, selection)
        setting.check(config)
        return setting

    @property
    def pending(self) -> int | None:
        """Tokens that may wait in a head, with lazy keys and values; None: they are not lazy."""
        return self.selection.pending if self.selection is not None and self.selection.kv == "lazy" else None

    def check(self, config: ModelConfig) -> None:
        """Raises: ConfigError where a model cannot run this."""
        if self.mode not in config.modes:
            raise ConfigError(
                f"mode {self.mode} needs an activation that is zero on a half line "
                f"({' or '.join(ZEROING_ACTIVATIONS)}); this model has {config.activation}: use mode dense"
            )
        if self.selection is not None:
            self.selection.counts(0, config)


def parse_share(text: str | None) -> float | None:
    """A share written as 1% or 0.01. Raises: ConfigError."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise ConfigError(f"expected a share like 1% or 0.01, found {text!r}")
    return share
