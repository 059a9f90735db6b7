"""Frozen, validated configurations. Sizes come from a checkpoint's config.json only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dejavu.errors import ConfigError

Mode = Literal["dense", "exact"]

# Activations whose output is exactly zero on a half line: only these allow the exact mode.
ZEROING_ACTIVATIONS = ("relu", "fatrelu")
ACTIVATIONS = (*ZEROING_ACTIVATIONS, "silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `scaling` holds the parameters of the published kind, by their config.json names."""

    theta: float = 10_000.0
    kind: str = "default"
    scaling: dict = field(default_factory=dict, hash=False)


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
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings"
        ).split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"config: {name} must be a positive integer, found {value!r}")
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
    def modes(self) -> tuple[Mode, ...]:
        """The modes this architecture supports: exact needs an activation that is exactly zero."""
        return ("dense", "exact") if self.activation in ZEROING_ACTIVATIONS else ("dense",)
