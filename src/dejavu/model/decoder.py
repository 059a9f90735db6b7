"""The decoder: one forward for prompts (matrix products, blocks.py) and one step for decode (our kernels).

Both read the same weights in kernel layout and write the same cache. Which blocks stand in a layer, and in
what order, follows from ModelConfig alone; a family adds no code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Layer, Norm, Weights
from dejavu.config import ZEROING_ACTIVATIONS, Mode, ModelConfig
from dejavu.errors import NotFiniteError
from dejavu.kernels.base import Backend
from dejavu.kernels.reference import Selection, Tokens
from dejavu.model.blocks import Blocks
from dejavu.model.cache import KVCache
from dejavu.model.counts import Counts
from dejavu.model.finite import Watch, is_finite, not_finite, trace
from dejavu.model.hooks import Hooks
from dejavu.model.rope import rope_table

if TYPE_CHECKING:
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
        self.blocks = Blocks(config, weights.dtype, ops)
        self._narrow = Blocks(config, weights.dtype, ops, narrow=True)
        self.scale = config.head_dim**-0.5
        self.device = weights.embed.device

    def new_cache(self, rows: int, capacity: int, pending: int | None = None) -> KVCache:
        """An empty cache of rows of up to `capacity` tokens, with its rotary table.

        With `pending`, keys and values are lazy: fewer than that many tokens of a head wait to be projected.
        Raises: CapacityError where it would not fit into the free memory.
        """
        c = self.config
        KVCache.require_memory(c, rows, capacity, self.weights.dtype, pending, self.device)
        table = None if c.rope is None else rope_table(c.rope, c.head_dim, capacity, c.max_position_embeddings)
        table = None if table is None else table.to(self.device)
        return KVCache.allocate(c, rows, capacity, self.weights.dtype, self.ops.empty, table, pending)

    # Decode

    def step(
        self,
        tokens: Tokens,
        cache: KVCache,
        *,
        mode: Mode = "dense",
        selector: Selector | None = None,
        counts: Counts | None = None,
    ) -> Tensor:
        """One step over tokens of any rows, through the kernels; can be captured and replayed.

        Args:
            tokens: to read; the cache holds all that stands before them in their rows.
            cache: its tensors are mutated; what the host knows of its rows is the caller's to keep.
            mode: "sparse" needs a selector; the other modes use none.
            counts: what is read is added.
        Returns: logits (N, V) float32.
        """
        assert (mode == "sparse") == (selector is not None)
        ops, c, w = self.ops, self.config, self.weights
        x = self._embed(tokens)
        if selector is not None:
            selector.begin(x, tokens)
        # `x` is the residual stream; `partials` and `bias` are what the last block adds to it.
        partials = bias = None
        for i, layer in enumerate(w.layers):
            if selector is not None:
                selector.collect(i, 0)
            y = self._norm(x, partials, bias, layer.attn_norm, tokens) if c.norm_before else x
            every = partial(self._attend, y, layer, tokens, cache, i, None, lazy=False)
            heads = None if selector is None else selector.heads(i, y, every)
            partials = self.attention_block(y, layer, tokens, cache, i, heads, counts)
            if selector is not None:
                selector.collect(i, 1)
            norm = layer.mlp_norm if c.norm_before else layer.attn_norm
            y = self._norm(x, partials, layer.attn.out_bias, norm, tokens)
            neurons = None if selector is None else selector.neurons(i, y)
            partials, bias = self._mlp(y, layer, tokens, i, neurons, mode, counts), layer.mlp.out_bias
            if not c.norm_before:
                x, partials, bias = self._norm(y, partials, bias, layer.mlp_norm, tokens), None, None
        y = self._norm(x, partials, bias, w.final_norm, tokens, exists=c.final_norm)
        if w.project_out is not None:
            y = ops.linear(y, w.project_out, None, tokens)
        return ops.linear(y, w.head, None, tokens)

    def _embed(self, tokens: Tokens) -> Tensor:
        w = self.weights
        x = self.ops.embed(tokens, w.embed)
        if w.project_in is not None:
            x = self.ops.linear(x, w.project_in, None, tokens)
        if w.position_table is not None:
            self.ops.add_positions(x, tokens, w.position_table, self.config.position_offset)
        return x

    def _mlp(
        self, y: Tensor, layer: Layer, tokens: Tokens, i: int, neurons: Selection, mode: Mode, counts: Counts | None
    ) -> Tensor:
        """Partial sums (S, N, C) of the MLP of layer `i`."""
        c, mlp = self.config, layer.mlp
        return self.ops.mlp(
            y,
            mlp.rows,
            mlp.in_bias,
            neurons,
            tokens,
            activation=c.activation,
            threshold=c.activation_threshold,
            activate_up=c.activate_up,
            # Within a selection too, a neuron that stays shut needs no output row.
            skip_zeros=mode != "dense" and c.activation in ZEROING_ACTIVATIONS,
            rows_read=None if counts is None else counts.rows_read[i],
        )

    def attention_block(
        self,
        y: Tensor,
        layer: Layer,
        tokens: Tokens,
        cache: KVCache,
        i: int,
        heads: Selection,
        counts: Counts | None = None,
    ) -> Tensor:
        """Attention of one decode step in layer `i`, as `step` calls it: partial sums (S, N, C) of its output.

        Args:
            y: (N, C) float32, the normalised input.
            heads: the query heads that are read.
        """
        o = self._attend(y, layer, tokens, cache, i, heads, lazy=cache.hidden is not None, counts=counts)
        return self.ops.attn_out(o, layer.attn.blocks, heads, tokens)

    def _attend(
        self,
        y: Tensor,
        layer: Layer,
        tokens: Tokens,
        cache: KVCache,
        i: int,
        heads: Selection,
        *,
        lazy: bool,
        counts: Counts | None = None,
    ) -> Tensor:
        """Outputs (N, H, D) of the selected heads of layer `i`, before the output projection."""
        more = {"hidden": cache.hidden[i], "kv_len": cache.kv_len[i], "pending": cache.pending} if lazy else {}
        more["attn_read"] = None if counts is None else counts.attn_read[i]
        k, v, attn = cache.k[i], cache.v[i], layer.attn
        q = self.ops.attn_qkv(y, attn.blocks, attn.qkv_bias, cache.cos_sin, tokens, k, v, heads, **more)
        return self.ops.attend(q, k, v, tokens, heads, scale=self.scale, window=self.config.sliding_window)

    def _norm(
        self, x: Tensor, partials: Tensor | None, bias: Tensor | None, norm: Norm, tokens: Tokens, exists: bool = True
    ) -> Tensor:
        kind = self.config.norm if exists else "none"
        return self.ops.add_norm(x, partials, bias, norm.weight, norm.bias, tokens, kind=kind, eps=self.config.norm_eps)

    # Prefill

    def prefill(
        self,
        ids: Tensor,
        cache: KVCache,
        row: int = 0,
        *,
        all_logits: bool = False,
        narrow: bool = False,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Read tokens, a whole prompt say, into one row of the cache, behind those that it holds.

        Args:
            ids: (T,) integer, at least one.
            all_logits: return the logits of every position, not of the last alone.
            narrow: multiply in what is fastest beside weights of this dtype (Blocks), not in float32.
            hooks: look into the pass, or mask what tokens read (TokenMasks).
        Returns: logits (V,) float32, or (T, V).
        Raises: ConfigError, CapacityError as KVCache.require_room does; NotFiniteError naming the layer where NaN or
            infinity begins.
        """
        outputs = []
        cache.require_room(row, ids.numel())
        for chunk in ids.split(PREFILL_CHUNK):
            wanted = None if all_logits else torch.tensor([len(chunk) - 1])
            outputs.append(self.forward([chunk], cache, [row], wanted, narrow=narrow, hooks=hooks))
        return torch.cat(outputs) if all_logits else outputs[-1][0]

    @torch.inference_mode()
    def forward(
        self,
        sequences: Sequence[Tensor],
        cache: KVCache,
        rows: Sequence[int] | None = None,
        wanted: Tensor | None = None,
        *,
        narrow: bool = False,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Read sequences in one pass, each into a row of the cache, behind the tokens that the row holds.

        Many short sequences thus cost what one long one costs.

        Args:
            sequences: of (T_i,) integers each, at least one. All of them pass at once: memory grows with their tokens.
            rows: of the cache, one a sequence; None: 0, 1, 2 ...
            wanted: (W,) int64, of which tokens of the sequences put one after another the logits are; None: of all.
            narrow, hooks: as in `prefill`; not both.
        Returns: logits (W, V) float32.
        Raises: as `prefill` does; the rows then hold what they held before.
        """
        spans, total = [], 0
        for row, ids in zip(range(len(sequences)) if rows is None else rows, sequences, strict=True):
            cache.require_room(row, ids.numel())
            spans.append(_Span(row, cache.length(row), total, total + ids.numel()))
            total += ids.numel()
        assert not (narrow and hooks)
        blocks = self._narrow if narrow else self.blocks
        hidden = self._forward(torch.cat(list(sequences)), cache, spans, blocks, hooks or Hooks())
        logits = blocks.logits(hidden if wanted is None else hidden[wanted.to(self.device)], self.weights)
        texts = [[*cache.tokens(span.row), *ids.tolist()] for span, ids in zip(spans, sequences, strict=True)]
        try:
            self._require_finite(logits, texts, hooks)
        except NotFiniteError:
            for span in spans:
                cache.settle(span.row)
            raise
        for span, ids in zip(spans, sequences, strict=True):
            cache.append(span.row, ids.tolist())
        return logits

    def _require_finite(self, logits: Tensor, texts: Sequence[Sequence[int]], hooks: Hooks | None) -> None:
        if is_finite(logits):
            return
        if isinstance(hooks, Watch):
            raise hooks.logits()
        errors = (trace(self, torch.tensor(ids)) for ids in texts)
        raise next((error for error in errors if error is not None), None) or not_finite("what is selected of a layer")

    def _forward(self, ids: Tensor, cache: KVCache, spans: Sequence[_Span], blocks: Blocks, hooks: Hooks) -> Tensor:
        """Hidden states (T, C) of the spans' tokens ids (T,), before the final norm."""
        c = self.config
        positions = torch.cat([torch.arange(s.start, s.start + s.end - s.begin) for s in spans]).to(self.device)
        x = blocks.embed(ids.to(self.device).long(), positions, self.weights)
        hooks.begin(x, positions)
        for i, layer in enumerate(self.weights.layers):
            y = blocks.norm(x, layer.attn_norm) if c.norm_before else x
            f = self._attention(y, layer, cache, i, positions, spans, blocks, hooks)
            hooks.block(i, "attention", x, f)
            x = x + f
            x = x if c.norm_before else blocks.norm(x, layer.attn_norm)
            y = blocks.norm(x, layer.mlp_norm) if c.norm_before else x
            f = blocks.mlp_out(hooks.neurons(i, y, blocks.activations(y, layer.mlp)), layer.mlp)
            hooks.block(i, "mlp", x, f)
            x = x + f
            x = x if c.norm_before else blocks.norm(x, layer.mlp_norm)
        return x

    def _attention(
        self,
        y: Tensor,
        layer: Layer,
        cache: KVCache,
        i: int,
        positions: Tensor,
        spans: Sequence[_Span],
        blocks: Blocks,
        hooks: Hooks,
    ) -> Tensor:
        angles = None if cache.cos_sin is None else cache.cos_sin[positions]
        q, k, v = blocks.qkv(y, layer.attn, angles)
        q = q.transpose(1, 2).flatten(0, 1)  # (H, T, D)
        outputs = []
        for s in spans:
            if cache.kv_len is not None:
                self._project_pending(layer, cache, i, s)
            here = slice(s.begin, s.end)
            outputs.append(self._attend_span(q[:, here], k[:, here], v[:, here], cache, i, s))
        o = hooks.heads(i, y, torch.cat(outputs, 1).transpose(0, 1).to(blocks.dtype))
        # PyTorch's attention makes zeros of a query whose scores are all NaN; 0 times what is not finite is NaN.
        poison = sum((bound * 0 for part in (q, k, v) for bound in part.aminmax()), torch.zeros((), device=y.device))
        return blocks.attention_out(o, layer.attn) + poison

    def _project_pending(self, layer: Layer, cache: KVCache, i: int, span: _Span) -> None:
        """Put the keys and values into the cache that wait in a span's row."""
        first = int(cache.kv_len[i, span.row].min())
        if first < span.start:
            at = torch.arange(first, span.start, device=self.device)
            angles = None if cache.cos_sin is None else cache.cos_sin[at]
            _, k, v = self.blocks.qkv(cache.hidden[i, span.row, at % cache.hidden.shape[2]], layer.attn, angles)
            for group, known in enumerate(cache.kv_len[i, span.row].tolist()):
                cache.k[i, span.row, group, known : span.start] = k[group, known - first :].to(cache.k.dtype)
                cache.v[i, span.row, group, known : span.start] = v[group, known - first :].to(cache.v.dtype)
        cache.kv_len[i, span.row] = span.start + span.end - span.begin

    def _attend_span(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, i: int, span: _Span) -> Tensor:
        """Put a span's keys and values (G, T, D) into the cache; outputs (H, T, D) of its queries (H, T, D)."""
        row, start, end = span.row, span.start, span.start + k.shape[1]
        cache.k[i][row, :, start:end] = k.to(cache.k.dtype)
        cache.v[i][row, :, start:end] = v.to(cache.v.dtype)
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


def _each(x: Tensor, times: int) -> Tensor:
    """Every group of x (G, T, D) as often as its heads need it, (G * times, T, D): a view where that is once."""
    return x[:, None].expand(-1, times, -1, -1).flatten(0, 1)
