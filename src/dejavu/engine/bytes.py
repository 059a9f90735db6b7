"""The bytes that one decode step reads, by part: what its time is made of."""

from __future__ import annotations

from torch import Tensor

from dejavu.checkpoint.layout import Norm, Weights
from dejavu.config import ModelConfig

PARTS = ("embedding", "attention", "mlp_in", "mlp_out", "lm_head", "kv")


def step_bytes(
    config: ModelConfig, weights: Weights, *, attended: float, batch: int = 1, rows_read: Tensor | None = None
) -> dict[str, float]:
    """Bytes read by one step of one token for every row of a batch.

    Args:
        weights: in kernel layout; may lie on the meta device.
        attended: tokens in the cache that a row attends to, its own included (mean over rows and steps).
        rows_read: (L, R) rows of each kind that the MLPs read (mean over steps); None: all of them.
    Returns: bytes by part, in the order of PARTS. "mlp_in" is fc1 (the gate), "mlp_out" fc2 (up and down);
        norms and biases count with the block that they belong to, keys and values as "kv".
    """
    itemsize = weights.dtype.itemsize
    parts = dict.fromkeys(PARTS, 0.0)
    parts["embedding"] = batch * itemsize * (
        config.embed_size + (0 if weights.position_table is None else config.hidden_size)
    ) + _size(weights.project_in)
    for i, layer in enumerate(weights.layers):
        rows = layer.mlp.rows
        read = [rows.shape[0]] * rows.shape[1] if rows_read is None else rows_read[i].tolist()
        row_bytes = rows.shape[2] * rows.itemsize
        parts["attention"] += _size(layer.attn.blocks, layer.attn.qkv_bias, layer.attn.out_bias, layer.attn_norm)
        parts["mlp_in"] += read[0] * row_bytes + _size(layer.mlp.in_bias, layer.mlp_norm)
        parts["mlp_out"] += sum(read[1:]) * row_bytes + _size(layer.mlp.out_bias)
    parts["lm_head"] = float(_size(weights.head, weights.project_out, weights.final_norm))
    kv_heads = config.num_hidden_layers * config.num_key_value_heads
    parts["kv"] = batch * attended * 2 * kv_heads * config.head_dim * itemsize
    return parts


def _size(*tensors: Tensor | Norm | None) -> int:
    flat = [t for x in tensors for t in ((x.weight, x.bias) if isinstance(x, Norm) else (x,))]
    return sum(t.nbytes for t in flat if t is not None)
