"""GPT-2: learned positions without an offset, biases, GELU, and matrices that are stored transposed."""

from __future__ import annotations

from dejavu.checkpoint.layout import Weights
from dejavu.checkpoint.slots import Fields, Slot, norm_slots, transposed_slot
from dejavu.config import ModelConfig


def parse(config: dict) -> ModelConfig:
    """Build the decoder's configuration from a GPT-2 config.json."""
    f = Fields(config)
    f.require("scale_attn_weights", True)
    f.require("scale_attn_by_inverse_layer_idx", False)
    f.require("add_cross_attention", False)
    f.divisible("n_embd", "n_head")
    hidden, heads = f.int("n_embd"), f.int("n_head")
    return ModelConfig(
        model_type="gpt2",
        vocab_size=f.int("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.int("n_inner", 4 * hidden),
        num_hidden_layers=f.int("n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=f.int("n_positions"),
        activation=f.activation("activation_function"),
        norm="layer",
        norm_eps=f.float("layer_norm_epsilon", 1e-5, low=0),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=f.bool("tie_word_embeddings", True),
        bos_token_id=f.optional_int("bos_token_id"),
        eos_token_ids=f.token_ids("eos_token_id"),
    )


EMBEDDINGS = "wte.weight"
PREFIXES = ("transformer.", "")  # GPT2LMHeadModel, and GPT2Model
IGNORED = (r"\.attn\.(masked_)?bias$",)  # the causal mask, which older checkpoints carry


def slots(config: ModelConfig, weights: Weights) -> dict[str, Slot]:
    """Where each tensor of the checkpoint goes, by name without prefix."""
    C, inter = config.hidden_size, config.intermediate_size
    out = {
        EMBEDDINGS: Slot(weights.embed),
        "wpe.weight": Slot(weights.position_table),
        **norm_slots("ln_f", weights.final_norm),
    }
    if weights.head is not weights.embed:
        out["lm_head.weight"] = Slot(weights.head)
    for i, layer in enumerate(weights.layers):
        at, attn, mlp = f"h.{i}.", layer.attn, layer.mlp
        out |= norm_slots(at + "ln_1", layer.attn_norm) | norm_slots(at + "ln_2", layer.mlp_norm)
        # One matrix (C, 3 C) holds the queries of all heads, then keys, then values, as columns.
        out[at + "attn.c_attn.weight"] = transposed_slot(attn.blocks[:, :3].transpose(0, 1), (C, 3 * C))
        out[at + "attn.c_attn.bias"] = Slot(attn.qkv_bias.transpose(0, 1), (3 * C,))
        out[at + "attn.c_proj.weight"] = Slot(attn.blocks[:, 3], (C, C))
        out[at + "attn.c_proj.bias"] = Slot(attn.out_bias)
        out[at + "mlp.c_fc.weight"] = transposed_slot(mlp.rows[:, 0], (C, inter))
        out[at + "mlp.c_fc.bias"] = Slot(mlp.in_bias)
        out[at + "mlp.c_proj.weight"] = Slot(mlp.rows[:, 1])
        out[at + "mlp.c_proj.bias"] = Slot(mlp.out_bias)
    return out
