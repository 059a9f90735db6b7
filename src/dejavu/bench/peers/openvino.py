"""OpenVINO: OPT written as a stateful graph of its operations, compiled by its CPU plugin.

The graph has the form that OpenVINO's own exporters give a language model: keys and values in variables, attention as
one operation, compressed weights as integers, a conversion and a scale. It is written here because the exporters
need older versions of transformers than this package does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from openvino.op import Constant
from openvino.op.util import Variable, VariableInfo
from torch import Tensor

from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dejavu.bench.peers import Source

_FILE = "model.xml"
# Weights of int4 share a scale along this many columns, or along the whole row where it is no multiple.
GROUP = 128


def formats() -> tuple[str, ...]:
    """Weight formats that are offered; int4 keeps embeddings and LM head in int8, as OpenVINO's own tools do."""
    return "bf16", "fp32", "int8", "int4"


def convert(source: Source, weights: str, folder: Path) -> None:
    """Write the graph and its weights into a folder."""
    model = source.hugging_face("fp32" if weights == "fp32" else "bf16")
    config = model.config
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        raise ConfigError("peer openvino is set up for OPT with norms before its blocks and no projections only")
    ov.save_model(_graph(model, weights), folder / _FILE, compress_to_fp16=False)


def load(folder: Path, weights: str, *, capacity: int, threads: int) -> OpenVino:
    """The graph, compiled."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return OpenVino(ov.Core().compile_model(folder / _FILE, "CPU", options).create_infer_request())


class OpenVino:
    """One sequence, greedily."""

    def __init__(self, request: ov.InferRequest):
        self._request = request

    def prefill(self, ids: Sequence[int]) -> int:
        self._request.reset_state()
        self._position = 0
        return self._next(ids)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, ids: Sequence[int]) -> int:
        n = self._position + len(ids)
        # In the order of the graph's parameters: tokens, positions, beams.
        inputs = [np.array([ids], np.int64), np.arange(self._position, n)[None], np.zeros(1, np.int32)]
        self._position = n
        self._request.infer(inputs, share_inputs=True)
        return int(self._request.get_output_tensor(0).data.argmax())


def _graph(model: PreTrainedModel, weights: str) -> ov.Model:
    """Logits (1, 1, V) of the last token from input_ids and position_ids (1, T), over keys and values kept so far."""
    c, d = model.config, model.model.decoder
    C, H = c.hidden_size, c.num_attention_heads
    table_format = "int8" if weights == "int4" else weights
    ids, positions = (op.parameter([-1, -1], np.int64, name) for name in ("input_ids", "position_ids"))
    beams = op.parameter([-1], np.int32, "beam_idx")
    table, zero = _matrix(d.embed_tokens.weight, table_format), op.constant(0, np.int64)
    x = op.add(
        op.gather(table, ids, zero),
        op.gather(
            _matrix(d.embed_positions.weight[d.embed_positions.offset :], "fp32" if weights == "fp32" else "bf16"),
            positions,
            zero,
        ),
    )
    batch = op.gather(op.shape_of(ids), op.constant([0], np.int64), zero)
    heads, flat = op.constant([0, 0, H, C // H], np.int64), op.constant([0, 0, C], np.int64)
    order = op.constant([0, 2, 1, 3], np.int64)
    empty = op.broadcast(op.constant(0.0, np.float32), op.concat([batch, op.constant([H, 0, C // H], np.int64)], 0))
    # Causal, and with keys from before: row t of T sees all but the last T - 1 - t keys.
    steps = op.squeeze(op.gather(op.shape_of(ids), op.constant([1], np.int64), zero), zero)
    sinks, mask = [], None
    for i, layer in enumerate(d.layers):
        attn, y = layer.self_attn, _norm(x, layer.self_attn_layer_norm)

        def split(part, y=y):
            return op.transpose(op.reshape(_linear(y, part, weights), heads, True), order)

        keys, values = (
            _extend(f"layer.{i}.{name}", split(part), empty, beams, H, C // H, sinks)
            for name, part in (("key", attn.k_proj), ("value", attn.v_proj))
        )
        if mask is None:
            total = op.squeeze(op.gather(op.shape_of(keys), op.constant([2], np.int64), zero), zero)
            one = op.constant(1, np.int64)
            key = op.range(zero, total, one, "i64")
            query = op.range(op.subtract(total, steps), total, one, "i64")
            seen = op.less_equal(op.unsqueeze(key, zero), op.unsqueeze(query, op.constant(1, np.int64)))
            mask = op.unsqueeze(
                op.select(seen, op.constant(0.0, np.float32), op.constant(-65504.0, np.float32)),
                op.constant([0, 1], np.int64),
            )
        out = op.scaled_dot_product_attention(split(attn.q_proj), keys, values, mask)
        x = op.add(x, _linear(op.reshape(op.transpose(out, order), flat, True), attn.out_proj, weights))
        y = op.relu(_linear(_norm(x, layer.final_layer_norm), layer.fc1, weights))
        x = op.add(x, _linear(y, layer.fc2, weights))
    last = op.gather(_norm(x, d.final_layer_norm), op.constant([-1], np.int64), op.constant(1, np.int64))
    logits = op.matmul(last, table, False, True)
    return ov.Model([op.result(logits)], sinks, [ids, positions, beams], "opt")


def _extend(name: str, new, empty, beams, heads: int, head_dim: int, sinks: list):
    """Keys or values (B, H, T, D) so far and the new ones behind them; what is kept is appended to `sinks`."""
    info = VariableInfo()
    info.data_shape, info.data_type = ov.PartialShape([-1, heads, -1, head_dim]), ov.Type.f32
    info.variable_id = name
    variable = Variable(info)
    kept = op.gather(op.read_value(empty, variable), beams, op.constant(0, np.int64))
    both = op.concat([kept, new], 2)
    sinks.append(op.assign(both, variable))
    return both


def _linear(x, linear: torch.nn.Linear, weights: str):
    return op.add(op.matmul(x, _matrix(linear.weight, weights), False, True), _floats(linear.bias))


def _norm(x, norm: torch.nn.LayerNorm):
    axes = op.constant([-1], np.int64)
    y = op.mvn(x, axes, True, norm.eps, "INSIDE_SQRT")
    return op.add(op.multiply(y, _floats(norm.weight)), _floats(norm.bias))


def _floats(tensor: Tensor):
    return op.constant(tensor.detach().float().numpy())


def _matrix(weight: Tensor, weights: str):
    """A matrix as float32: a constant in the format asked for, and what makes floats of it."""
    weight = weight.detach()
    if weights == "fp32":
        return _floats(weight)
    if weights == "bf16":
        bits = weight.bfloat16().contiguous().view(torch.int16).numpy()
        return op.convert(_constant(bits, weight.shape, ov.Type.bf16), "f32")
    rows, columns = weight.shape
    group = GROUP if weights == "int4" and columns % GROUP == 0 else columns
    values = weight.float().view(rows, -1, group)
    top = 7 if weights == "int4" else 127
    scale = (values.abs().amax(-1, keepdim=True) / top).clamp(min=1e-12)
    q = (values / scale).round_().to(torch.int8)
    if weights == "int4":
        packed = ((q[..., 0::2] & 15) | (q[..., 1::2] << 4)).view(torch.uint8).contiguous().numpy()
        constant = _constant(packed, q.shape, ov.Type.i4)
    else:
        constant = op.constant(q.contiguous().numpy())
    floats = op.multiply(op.convert(constant, "f32"), op.constant(scale.numpy()))
    return op.reshape(floats, op.constant([rows, columns], np.int64), False)


def _constant(data: np.ndarray, shape: Sequence[int], kind: ov.Type):
    """A constant of a type that numpy lacks, from its bytes, which are copied: a graph doesn't keep an array alive."""
    tensor = ov.Tensor(kind, ov.Shape(list(shape)))
    tensor.data.view(np.uint8).reshape(-1)[:] = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    return Constant(tensor)
