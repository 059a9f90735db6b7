"""OPT, 125m to 66b: learned positions, biases, ReLU; 350m is post-norm with projections in and out."""

from __future__ import annotations

from dejavu.checkpoint.layout import Weights
from dejavu.checkpoint.slots import Fields, Slot, attention_slots, mlp_slots, norm_slots
from dejavu.config import ModelConfig


def parse(config: dict) -> ModelConfig:
    """Build the decoder's configuration from an OPT config.json."""
    f = Fields(config)
    hidden, heads = f.int("hidden_size"), f.int("num_attention_heads")
    f.divisible("hidden_size", "num_attention_heads")
    bias = f.bool("enable_bias", True)
    before = f.bool("do_layer_norm_before", True)
    return ModelConfig(
        model_type="opt",
        vocab_size=f.int("vocab_size"),
        hidden_size=hidden,
        embed_size=f.int("word_embed_proj_dim", hidden),
        intermediate_size=f.int("ffn_dim"),
        num_hidden_layers=f.int("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=f.int("max_position_embeddings"),
        position_offset=2,
        activation=f.activation("activation_function"),
        norm="layer",
        norm_before=before,
        norm_affine=f.bool("layer_norm_elementwise_affine", True),
        # As Hugging Face: the post-norm model, and early checkpoints that say so, end without a norm.
        final_norm=before and not f.bool("_remove_final_layer_norm", False),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=f.bool("tie_word_embeddings", True),
        bos_token_id=f.optional_int("bos_token_id"),
        eos_token_ids=f.token_ids("eos_token_id"),
    )


EMBEDDINGS = "decoder.embed_tokens.weight"
PREFIXES = ("model.", "")  # OPTForCausalLM, and the older OPTModel checkpoints
IGNORED = (r"decoder\.version$",)  # a marker that early conversions kept


def slots(config: ModelConfig, weights: Weights) -> dict[str, Slot]:
    """Where each tensor of the checkpoint goes, by name without prefix."""
    out = {
        EMBEDDINGS: Slot(weights.embed),
        "decoder.embed_positions.weight": Slot(weights.position_table),
        **norm_slots("decoder.final_layer_norm", weights.final_norm),
    }
    if weights.project_in is not None:
        out["decoder.project_in.weight"] = Slot(weights.project_in)
        out["decoder.project_out.weight"] = Slot(weights.project_out)
    if weights.head is not weights.embed:
        out["lm_head.weight"] = Slot(weights.head)
    for i, layer in enumerate(weights.layers):
        at = f"decoder.layers.{i}."
        out |= norm_slots(at + "self_attn_layer_norm", layer.attn_norm)
        out |= norm_slots(at + "final_layer_norm", layer.mlp_norm)
        out |= attention_slots(at + "self_attn.", layer.attn, out="out_proj")
        out |= mlp_slots(at, layer.mlp, ("fc1", "fc2"))
    return out
