"""The decoder: one forward for prefill (PyTorch GEMMs) and one step for decode (our kernels).

Both read the same weights in kernel layout and write the same cache. Which blocks stand in a layer, and in
what order, follows from ModelConfig alone; a family adds no code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Layer, Norm, Weights
from dejavu.config import ZEROING_ACTIVATIONS, Mode, ModelConfig
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import dense
from dejavu.kernels.reference import Selection, activate, rotate
from dejavu.model.cache import KVCache
from dejavu.model.finite import Watch, is_finite, not_finite, trace
from dejavu.model.hooks import Hooks
from dejavu.model.rope import rope_table
from dejavu.selection.selector import Selector

# Prefill works through a prompt in chunks, so that memory does not grow with T * I or T * S.
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class _Span:
    """Tokens `begin` to `end` of a pass: they stand at positions `start` and on of a row of the cache."""

    row: int
    start: int
    begin: int
    end: int


class Decoder:
    """A model ready to run.

    Args:
        config: the architecture.
        weights: in kernel layout, on the backend's device.
        ops: the backend.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Backend):
        self.config, self.weights, self.ops = config, weights, ops
        self.scale = config.head_dim**-0.5
        self.device = weights.embed.device

    def new_cache(self, batch: int, capacity: int, pending: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens, with its rotary table.

        With `pending`, keys and values are lazy: up to that many tokens of a head wait to be projected.
        Raises: CapacityError where it would not fit into the free memory.
        """
        c = self.config
        KVCache.require_memory(c, batch, capacity, self.weights.dtype, pending, self.device)
        table = None if c.rope is None else rope_table(c.rope, c.head_dim, capacity, c.max_position_embeddings)
        table = None if table is None else table.to(self.device)
        return KVCache.allocate(c, batch, capacity, self.weights.dtype, self.ops.empty, table, pending)

    # Decode

    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        *,
        mode: Mode = "dense",
        selector: Selector | None = None,
        rows_read: Tensor | None = None,
    ) -> Tensor:
        """One token for every row, through the kernels; can be captured and replayed.

        Args:
            ids: (B,) int32, the tokens to read.
            positions: (B,) int32, where they stand; the cache holds positions 0 .. positions-1 of each row.
            cache: mutated.
            mode: "sparse" needs a selector; the other modes use none.
            rows_read: (L, R) int64 or None; see kernels.reference.mlp.
        Returns: logits (B, V) float32.
        """
        assert (mode == "sparse") == (selector is not None)
        ops, c, w = self.ops, self.config, self.weights
        # Within a selection too, a neuron that stays shut needs no output row.
        exact = mode != "dense" and c.activation in ZEROING_ACTIVATIONS
        x = ops.embed(ids, w.embed)
        if w.project_in is not None:
            x = ops.linear(x, w.project_in)
        if w.position_table is not None:
            ops.add_positions(x, positions, w.position_table, c.position_offset)
        if selector is not None:
            selector.begin(x)

        # `x` is the residual stream; `partials` and `bias` are what the last block adds to it.
        partials = bias = None
        for i, layer in enumerate(w.layers):
            if selector is not None:
                selector.collect(i, 0)
            y = self._norm(x, partials, bias, layer.attn_norm) if c.norm_before else x
            every = partial(self._attend, y, layer, positions, cache, i, None, lazy=False)
            heads = None if selector is None else selector.heads(i, y, every)
            partials = self.attention_block(y, layer, positions, cache, i, heads)
            if selector is not None:
                selector.collect(i, 1)
            y = self._norm(x, partials, layer.attn.out_bias, layer.mlp_norm if c.norm_before else layer.attn_norm)
            neurons = None if selector is None else selector.neurons(i, y)
            partials, bias = (
                ops.mlp(
                    y,
                    layer.mlp.rows,
                    layer.mlp.in_bias,
                    neurons,
                    activation=c.activation,
                    threshold=c.activation_threshold,
                    activate_up=c.activate_up,
                    exact=exact,
                    rows_read=None if rows_read is None else rows_read[i],
                ),
                layer.mlp.out_bias,
            )
            if not c.norm_before:
                x, partials, bias = self._norm(y, partials, bias, layer.mlp_norm), None, None
        y = self._norm(x, partials, bias, w.final_norm, exists=c.final_norm)
        if w.project_out is not None:
            y = ops.linear(y, w.project_out)
        return ops.linear(y, w.head)

    def attention_block(
        self, y: Tensor, layer: Layer, positions: Tensor, cache: KVCache, i: int, heads: Selection
    ) -> Tensor:
        """Attention of one decode step in layer `i`, as `step` calls it: partial sums (S, B, C) of its output.

        Args:
            y: (B, C) float32, the normalised input.
            heads: the query heads that are read.
        """
        o = self._attend(y, layer, positions, cache, i, heads, lazy=cache.hidden is not None)
        return self.ops.attn_out(o, layer.attn.blocks, heads)

    def _attend(
        self, y: Tensor, layer: Layer, positions: Tensor, cache: KVCache, i: int, heads: Selection, *, lazy: bool
    ) -> Tensor:
        """Outputs (B, H, D) of the selected heads of layer `i`, before the output projection."""
        pending = {"hidden": cache.hidden[i], "kv_len": cache.kv_len[i]} if lazy else {}
        k, v, attn = cache.k[i], cache.v[i], layer.attn
        q = self.ops.attn_qkv(y, attn.blocks, attn.qkv_bias, cache.cos_sin, positions, k, v, heads, **pending)
        return self.ops.attend(q, k, v, positions, heads, scale=self.scale, window=self.config.sliding_window)

    def _norm(self, x: Tensor, partials: Tensor | None, bias: Tensor | None, norm: Norm, exists: bool = True) -> Tensor:
        kind = self.config.norm if exists else "none"
        return self.ops.add_norm(x, partials, bias, norm.weight, norm.bias, kind=kind, eps=self.config.norm_eps)

    # Prefill

    @torch.inference_mode()
    def prefill(
        self, ids: Tensor, cache: KVCache, row: int = 0, *, all_logits: bool = False, hooks: Hooks | None = None
    ) -> Tensor:
        """Read a whole prompt into one row of the cache, from position 0.

        Args:
            ids: (T,) integer, 1 <= T <= the cache's capacity.
            all_logits: return the logits of every position, not of the last alone.
            hooks: look into the pass, or mask what tokens read (TokenMasks).
        Returns: logits (V,) float32, or (T, V).
        Raises: NotFiniteError naming the layer where NaN or infinity begins.
        """
        outputs, hooks = [], hooks or Hooks()
        for start in range(0, ids.numel(), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            hidden = self._forward(chunk, cache, [_Span(row, start, 0, chunk.numel())], hooks)
            last = start + chunk.numel() == ids.numel()
            if all_logits:
                outputs.append(self._head(hidden))
            elif last:
                outputs.append(self._head(hidden[-1:]))
        logits = torch.cat(outputs)
        self._require_finite(logits, [ids], hooks)
        return logits if all_logits else logits[0]

    @torch.inference_mode()
    def forward(
        self, sequences: Sequence[Tensor], cache: KVCache, wanted: Tensor | None = None, *, hooks: Hooks | None = None
    ) -> Tensor:
        """Read whole sequences in one pass, sequence i into row i of the cache.

        Many short sequences thus cost what one long one costs.

        Args:
            sequences: of (T_i,) integers each, 1 <= T_i <= the cache's capacity. All of them pass at once: memory
                grows with their tokens.
            wanted: (W,) int64, of which tokens of the sequences put one after another the logits are; None: of all.
            hooks: as in `prefill`.
        Returns: logits (W, V) float32.
        Raises: NotFiniteError as `prefill` does.
        """
        spans, total = [], 0
        for row, ids in enumerate(sequences):
            spans.append(_Span(row, 0, total, total + ids.numel()))
            total += ids.numel()
        hooks = hooks or Hooks()
        hidden = self._forward(torch.cat(list(sequences)), cache, spans, hooks)
        logits = self._head(hidden if wanted is None else hidden[wanted.to(self.device)])
        self._require_finite(logits, sequences, hooks)
        return logits

    def _require_finite(self, logits: Tensor, sequences: Sequence[Tensor], hooks: Hooks) -> None:
        if is_finite(logits):
            return
        if isinstance(hooks, Watch):
            raise hooks.logits()
        errors = (trace(self, ids) for ids in sequences)
        raise next((error for error in errors if error is not None), None) or not_finite("what is selected of a layer")

    def _forward(self, ids: Tensor, cache: KVCache, spans: Sequence[_Span], hooks: Hooks) -> Tensor:
        """Hidden states (T, C) of the spans' tokens ids (T,), before the final norm."""
        c, w = self.config, self.weights
        ids = ids.to(self.device).long()
        positions = torch.cat([torch.arange(s.start, s.start + s.end - s.begin) for s in spans]).to(self.device)
        x = dense(w.embed[ids])
        if w.project_in is not None:
            x = self.ops.matmul(x, self.ops.plain(w.project_in, w.dtype).T)
        if w.position_table is not None:
            x = x + w.position_table[positions + c.position_offset].float()
        hooks.begin(x, positions)
        for i, layer in enumerate(w.layers):
            y = self._plain_norm(x, layer.attn_norm) if c.norm_before else x
            f = self._attention(y, layer, cache, i, positions, spans, hooks)
            hooks.block(i, "attention", x, f)
            x = x + f
            x = x if c.norm_before else self._plain_norm(x, layer.attn_norm)
            y = self._plain_norm(x, layer.mlp_norm) if c.norm_before else x
            f = self._mlp(y, layer, i, hooks)
            hooks.block(i, "mlp", x, f)
            x = x + f
            x = x if c.norm_before else self._plain_norm(x, layer.mlp_norm)
        return x

    def _attention(
        self, y: Tensor, layer: Layer, cache: KVCache, i: int, positions: Tensor, spans: Sequence[_Span], hooks: Hooks
    ) -> Tensor:
        # Quantised weights are unpacked for the GEMMs one block of a layer at a time.
        blocks = self.ops.plain(layer.attn.blocks, self.weights.dtype)
        G, _, D, C = blocks.shape
        r, T = layer.attn.heads_per_group, y.shape[0]
        # One batched GEMM over the groups reads q, k and v in place: (G, T, (r+2) D).
        qkv = self.ops.matmul(y, blocks[:, : r + 2].view(G, (r + 2) * D, C).transpose(1, 2)).view(G, T, r + 2, D)
        if layer.attn.qkv_bias is not None:
            qkv = qkv + layer.attn.qkv_bias[:, None]
        q, k, v = qkv[:, :, :r], qkv[:, :, r], qkv[:, :, r + 1]
        if cache.cos_sin is not None:
            angles = cache.cos_sin[positions]
            q, k = rotate(q, angles[:, None]), rotate(k, angles)
        q = q.permute(0, 2, 1, 3).reshape(G * r, T, D)
        o = torch.cat(
            [
                self._attend_span(q[:, s.begin : s.end], k[:, s.begin : s.end], v[:, s.begin : s.end], cache, i, s)
                for s in spans
            ],
            1,
        )
        o = hooks.heads(i, y, o.transpose(0, 1).float()).transpose(0, 1)
        # PyTorch's attention makes zeros of a query whose scores are all NaN; 0 times what is not finite is NaN.
        low, high = qkv.aminmax()
        out = torch.zeros(T, C, device=y.device) + (low * 0 + high * 0)
        for h in range(G * r):
            out += self.ops.matmul(o[h], blocks[h // r, r + 2 + h % r])
        return out if layer.attn.out_bias is None else out + layer.attn.out_bias

    def _attend_span(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, i: int, span: _Span) -> Tensor:
        """Put a span's keys and values (G, T, D) into the cache; outputs (H, T, D) of its queries (H, T, D)."""
        row, start, end = span.row, span.start, span.start + k.shape[1]
        cache.k[i][row, :, start:end] = k.to(cache.k.dtype)
        cache.v[i][row, :, start:end] = v.to(cache.v.dtype)
        if cache.kv_len is not None:
            cache.kv_len[i, row] = end
        keys, values = cache.k[i][row, :, :end], cache.v[i][row, :, :end]
        mask = None
        if start > 0 or self.config.sliding_window is not None:
            at = torch.arange(start, end, device=q.device)[:, None] - torch.arange(end, device=q.device)
            mask = (at >= 0) if self.config.sliding_window is None else (at >= 0) & (at < self.config.sliding_window)
        r = self.config.heads_per_group
        return F.scaled_dot_product_attention(
            q[None].to(keys.dtype),
            _each(keys, r)[None],
            _each(values, r)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )[0]

    def _mlp(self, y: Tensor, layer: Layer, i: int, hooks: Hooks) -> Tensor:
        c, rows = self.config, self.ops.plain(layer.mlp.rows, self.weights.dtype)
        bias = None if layer.mlp.in_bias is None else layer.mlp.in_bias.view(rows.shape[0], -1)

        def up(part: int) -> Tensor:
            out = self.ops.matmul(y, rows[:, part].T)
            return out if bias is None else out + bias[:, part]

        h = activate(up(0), c.activation, c.activation_threshold)
        if c.gated:
            gate, h = h, up(1)
            h = gate * (activate(h, c.activation, c.activation_threshold) if c.activate_up else h)
        out = self.ops.matmul(hooks.neurons(i, y, h), rows[:, -1])
        return out if layer.mlp.out_bias is None else out + layer.mlp.out_bias

    def _head(self, x: Tensor) -> Tensor:
        w = self.weights
        y = self._plain_norm(x, w.final_norm) if self.config.final_norm else x
        y = y if w.project_out is None else self.ops.matmul(y, self.ops.plain(w.project_out, w.dtype).T)
        return self.ops.matmul(y, self.ops.plain(w.head, w.dtype).T)

    def _plain_norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self.config.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], norm.weight, self.config.norm_eps)
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.config.norm_eps)


def _each(x: Tensor, times: int) -> Tensor:
    """Every group of x (G, T, D) as often as its heads need it, (G * times, T, D): a view where that is once."""
    return x[:, None].expand(-1, times, -1, -1).flatten(0, 1)
