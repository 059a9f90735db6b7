"""The bytes that one decode step reads, by part: what its time is made of."""

from __future__ import annotations

from torch import Tensor

from dejavu.checkpoint.layout import Norm, Weights
from dejavu.config import ModelConfig
from dejavu.kernels.quantized import Weight

PARTS = ("embedding", "attention", "mlp_in", "mlp_out", "predictor", "lm_head", "kv")


def step_bytes(
    config: ModelConfig,
    weights: Weights,
    *,
    attended: float,
    batch: float = 1,
    rows_read: Tensor | None = None,
    attn_read: Tensor | None = None,
    predictor_bytes: int = 0,
) -> dict[str, float]:
    """Bytes read by one step, of one token of each of its texts.

    Args:
        weights: in kernel layout; may lie on the meta device.
        attended: tokens in the cache that a token attends to, its own included (mean over tokens and steps).
        batch: tokens of a step (mean over steps).
        rows_read: (L, R) rows of each kind that the MLPs read (mean over steps); None: all of them.
        attn_read: (L, 3) as model.counts has them (mean over steps): query heads that were read, groups whose cache
            was, and groups whose keys and values were projected; None: all of them.
        predictor_bytes: what a selector reads to choose.
    Returns: bytes by part, in the order of PARTS. "mlp_in" is fc1 (the gate), "mlp_out" fc2 (up and down);
        norms and biases count with the block that they belong to, keys and values as "kv".
    """
    parts = dict.fromkeys(PARTS, 0.0)
    tables = [table for table in (weights.embed, weights.position_table) if table is not None]
    parts["embedding"] = batch * sum(table[0].nbytes for table in tables) + _size(weights.project_in)
    H, G = config.num_attention_heads, config.num_key_value_heads
    cached = 0.0
    for i, layer in enumerate(weights.layers):
        rows = layer.mlp.rows
        read = [rows.shape[0]] * rows.shape[1] if rows_read is None else rows_read[i].tolist()
        row_bytes = rows[0, 0].nbytes
        heads, attended_groups, projected = (H, G, G) if attn_read is None else attn_read[i].tolist()
        # A head has a query and an output block, a group one of keys and one of values.
        parts["attention"] += 2 * (heads + projected) * layer.attn.blocks[0, 0].nbytes
        parts["attention"] += _size(layer.attn.qkv_bias, layer.attn.out_bias, layer.attn_norm)
        cached += attended_groups
        parts["mlp_in"] += read[0] * row_bytes + _size(layer.mlp.in_bias, layer.mlp_norm)
        parts["mlp_out"] += sum(read[1:]) * row_bytes + _size(layer.mlp.out_bias)
    parts["predictor"] = float(predictor_bytes)
    parts["lm_head"] = float(_size(weights.head, weights.project_out, weights.final_norm))
    parts["kv"] = batch * attended * 2 * cached * config.head_dim * weights.dtype.itemsize
    return parts


def _size(*tensors: Weight | Norm | None) -> int:
    flat = [t for x in tensors for t in ((x.weight, x.bias) if isinstance(x, Norm) else (x,))]
    return sum(t.nbytes for t in flat if t is not None)
