"""Llama: RMS norms, rotary positions, grouped heads, a gated MLP. ReluLLaMA and ProSparse are Llamas with ReLU."""

from __future__ import annotations

from dejavu.checkpoint.layout import Weights
from dejavu.checkpoint.slots import Fields, Slot, attention_slots, mlp_slots, norm_slots
from dejavu.config import ModelConfig
from dejavu.model.rope import parse_rope


def parse(config: dict) -> ModelConfig:
    """Build the decoder's configuration from a Llama config.json."""
    f = Fields(config)
    heads, positions = f.int("num_attention_heads"), f.int("max_position_embeddings")
    head_dim = f.optional_int("head_dim")
    if head_dim is None:
        f.divisible("hidden_size", "num_attention_heads")
        head_dim = f.int("hidden_size") // heads
    activation = f.activation("hidden_act")
    bias = f.bool("attention_bias", False)
    return ModelConfig(
        model_type=config["model_type"],
        vocab_size=f.int("vocab_size"),
        hidden_size=f.int("hidden_size"),
        intermediate_size=f.int("intermediate_size"),
        num_hidden_layers=f.int("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=f.int("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        activation=activation,
        activation_threshold=f.float("hidden_act_param", low=0) if activation == "fatrelu" else 0.0,
        gated=True,
        norm="rms",
        norm_eps=f.float("rms_norm_eps", 1e-6, low=0),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=f.bool("mlp_bias", False),
        rope=parse_rope(config, head_dim, positions),
        tie_word_embeddings=f.bool("tie_word_embeddings", False),
        bos_token_id=f.optional_int("bos_token_id"),
        eos_token_ids=f.token_ids("eos_token_id"),
    )


EMBEDDINGS = "embed_tokens.weight"
PREFIXES = ("model.", "")  # LlamaForCausalLM, and LlamaModel
IGNORED = (r"\.rotary_emb\.inv_freq$",)  # older checkpoints carry what config.json says


def slots(config: ModelConfig, weights: Weights) -> dict[str, Slot]:
    """Where each tensor of the checkpoint goes, by name without prefix."""
    out = {EMBEDDINGS: Slot(weights.embed), **norm_slots("norm", weights.final_norm)}
    if weights.head is not weights.embed:
        out["lm_head.weight"] = Slot(weights.head)
    for i, layer in enumerate(weights.layers):
        at = f"layers.{i}."
        out |= norm_slots(at + "input_layernorm", layer.attn_norm)
        out |= norm_slots(at + "post_attention_layernorm", layer.mlp_norm)
        out |= attention_slots(at + "self_attn.", layer.attn, out="o_proj")
        out |= mlp_slots(at + "mlp.", layer.mlp, ("gate_proj", "up_proj", "down_proj"))
    return out
