"""What every op means, in plain PyTorch. The other backends are tested against this file.

One decode step works on `N` tokens (`Tokens`), each of some row of the cache. All activations are float32; weights
are float32, bfloat16, float16 or quantised (quantized.py: an op computes with what `dequantized` makes of them); norms
and biases are float32; index and position tensors are int32.

Padding fills a step up to its size. No op reads or writes the cache for it, selects or counts for it, or lets it open
a row of weights; what an op returns for it is undefined. Ops that treat every token alike take `tokens` only to know
the padding: without, all are real.

Weights lie as the decode step reads them (docs/architecture.md):

- MLP `rows`: `(I, 2, C)` = fc1 row, fc2 column; gated `(I, 3, C)` = gate, up, down.
- attention `blocks`: `(G, 2r+2, D, C)` with `r = H / G` query heads a group, in the order
  `q_0..q_{r-1}, k, v, o_0..o_{r-1}`, `o` being the transposed output projection. Without grouped heads
  this is `(H, 4, D, C)`.

Ops that sum over many rows (`attn_out`, `mlp`) return *partial sums* `(S, N, C)`: a backend splits the
rows into slices that depend on the shapes alone, and `add_norm` adds the slices in order. So a result
does not depend on the number of threads, on timing or on which other tokens are in the step.

A selection is a pair `(idx, count)`: `idx` int32 of fixed capacity, sorted and unique in its first
`count[0]` entries; `count` int32 of shape (1,), on the device. `None` selects everything.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.quantized import Weight, dequantized

Selection = tuple[Tensor, Tensor] | None


class Tokens(NamedTuple):
    """The tokens of a step, all (N,) int32: token n stands at `positions[n]` of row `rows[n]` of the cache.

    Tokens of one row stand together, in the order of their positions, without gaps. A row below 0 is padding, which
    has id and position 0 and stands behind all real tokens; of these there is at least one.
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor

    @classmethod
    def one_a_row(cls, positions: Tensor, ids: Tensor | None = None) -> Self:
        """Token n stands in row n."""
        rows = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        return cls(torch.zeros_like(rows) if ids is None else ids, rows, positions)

    def live(self) -> int:
        """How many tokens are real."""
        return int((self.rows >= 0).sum())


def activate(x: Tensor, activation: str, threshold: float = 0.0) -> Tensor:
    """Apply an MLP activation elementwise; `threshold` is FATReLU's (x where x > threshold, else 0)."""
    if activation == "relu":
        return F.relu(x)
    if activation == "fatrelu":  # as relu, what is not a number stays so
        return torch.where(x <= threshold, torch.zeros_like(x), x)
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    assert activation == "gelu_tanh", activation
    return F.gelu(x, approximate="tanh")


def embed(tokens: Tokens, table: Weight) -> Tensor:
    """Look up token embeddings.

    Args:
        tokens: ids in [0, V).
        table: (V, E).
    Returns: (N, E) float32.
    """
    return dequantized(table[tokens.ids.long()])


def add_positions(x: Tensor, tokens: Tokens, table: Tensor, offset: int) -> None:
    """Add learned positions in place: `x[n] += table[positions[n] + offset]`. x: (N, C) float32; table: (M, C)."""
    x += table[(tokens.positions + offset).long()].float()


def add_norm(
    x: Tensor,
    partials: Tensor | None,
    partial_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tokens | None = None,
    *,
    kind: str,
    eps: float,
) -> Tensor:
    """Add partial sums to the residual stream, then normalise: `x += bias_p + sum_s partials[s]; y = norm(x)`.

    Args:
        x: (N, C) float32, mutated.
        partials: (S, N, C) float32, added in the order of S; or None.
        partial_bias: (C,) float32 or None.
        weight, bias: (C,) float32 affine parameters, or None.
        kind: "layer", "rms" or "none" (y is a copy of x).
    Returns: y (N, C) float32.
    """
    if partials is not None:
        total = partials[0].clone()
        for part in partials[1:]:
            total += part
        if partial_bias is not None:
            total += partial_bias
        x += total
    if kind == "none":
        return x.clone()
    if kind == "rms":
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return y * weight if weight is not None else y
    assert kind == "layer", kind
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
    """Dense rows: `x @ weight.T + bias`. x: (N, C) float32; weight: (M, C); returns (N, M) float32.

    Reads M*C weights once for all tokens; accumulates in float32.
    """
    return F.linear(x, dequantized(weight), bias)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pairs `(x[i], x[i + D/2])`. x: (..., D); cos_sin: (..., D) = cosines (D/2), then sines (D/2)."""
    cos, sin = cos_sin.chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attn_qkv(
    x: Tensor,
    blocks: Weight,
    bias: Tensor | None,
    cos_sin: Tensor | None,
    tokens: Tokens,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Selection = None,
    *,
    hidden: Tensor | None = None,
    kv_len: Tensor | None = None,
    pending: int = 0,
    attn_read: Tensor | None = None,
) -> Tensor:
    """Project queries of the selected heads, and append keys and values to the cache.

    With `hidden` and `kv_len` None, the key and value of every group are written at each token's place.
    Otherwise keys and values are lazy: `x[n]` is stored at `hidden[rows[n], positions[n] % Q]`; for each group with a
    selected head, and each group of a row that now has `pending` tokens or more waiting, the keys and values of all
    tokens of the row that wait, `kv_len[row, g]` and on, are projected from `hidden`, and `kv_len[row, g]` becomes the
    length of the row. (A backend may then project that group for the other rows too.) So less than `pending` tokens
    wait when a step begins.

    Args:
        x: (N, C) float32, the normalised input of this layer's attention.
        blocks: (G, 2r+2, D, C), see the module's docstring.
        bias: (G, r+2, D) float32 in the order q_0.., k, v; or None.
        cos_sin: (M, D) float32 rotary table, row = position; None for learned positions.
        tokens: positions below S, rows below R.
        k_cache, v_cache: (R, G, S, D), mutated.
        heads: selection over the H query heads.
        hidden: (R, Q, C) float32 ring of normalised inputs, mutated.
        kv_len: (R, G) int32, tokens already projected, mutated.
        pending: at least 1, and at most Q + 1 less the tokens of any one row in this step.
        attn_read: (3,) int64, mutated: what this step reads is added: query heads; groups with a selected head, whose
            cache is read; groups whose keys and values are projected, for any row.
    Returns: q (N, H, D) float32; those of heads that are not selected are undefined.
    """
    G, parts, D, _ = blocks.shape
    r = (parts - 2) // 2
    selected = _head_mask(heads, G * r, x.device).view(G, r)

    def project(rows: Tensor, group: int, part: int, positions: Tensor) -> Tensor:
        out = rows @ dequantized(blocks[group, part]).T
        out = out if bias is None else out + bias[group, part]
        return out if cos_sin is None or part > r else rotate(out, cos_sin[positions.long()])

    live = tokens.live()
    q = torch.zeros(x.shape[0], G * r, D, dtype=torch.float32, device=x.device)
    for head in torch.nonzero(selected.flatten()).flatten().tolist():
        q[:live, head] = project(x[:live], head // r, head % r, tokens.positions[:live])
    if hidden is not None:
        hidden[tokens.rows[:live].long(), tokens.positions[:live].long() % hidden.shape[1]] = x[:live]
    projected = torch.zeros(G, dtype=torch.bool)
    for row in tokens.rows[:live].unique().tolist():
        new = tokens.positions[tokens.rows == row]
        end = int(new[-1]) + 1
        for g in range(G):
            first = int(new[0]) if hidden is None else int(kv_len[row, g])
            if hidden is not None and not selected[g].any() and end - first < pending:
                continue
            projected[g] = True
            at = torch.arange(first, end, device=x.device)
            inputs = x[tokens.rows == row] if hidden is None else hidden[row, at % hidden.shape[1]]
            k_cache[row, g, at] = project(inputs, g, r, at).to(k_cache.dtype)
            v_cache[row, g, at] = project(inputs, g, r + 1, at).to(v_cache.dtype)
            if hidden is not None:
                kv_len[row, g] = end
    if attn_read is not None:
        counts = selected.sum(), selected.any(1).sum(), projected.sum()
        attn_read += torch.tensor([int(count) for count in counts], device=attn_read.device)
    return q


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tokens,
    heads: Selection = None,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of each token's queries over its row of the cache, positions 0 .. positions[n].

    Args:
        q: (N, H, D) float32.
        k_cache, v_cache: (R, G, S, D).
        window: sliding window; only the last `window` positions are attended.
    Returns: (N, H, D) float32; those of heads that are not selected are undefined.
    Reads `2 * (positions[n] + 1) * D` cache elements for each token and group with a selected head.
    """
    H = q.shape[1]
    r = H // k_cache.shape[1]
    selected = _head_mask(heads, H, q.device)
    out = torch.zeros_like(q)
    for n in range(tokens.live()):
        row, end = int(tokens.rows[n]), int(tokens.positions[n]) + 1
        start = 0 if window is None else max(0, end - window)
        for h in torch.nonzero(selected).flatten().tolist():
            k, v = k_cache[row, h // r, start:end].float(), v_cache[row, h // r, start:end].float()
            out[n, h] = torch.softmax(k @ q[n, h] * scale, 0) @ v
    return out


def attn_out(o: Tensor, blocks: Weight, heads: Selection = None, tokens: Tokens | None = None) -> Tensor:
    """Output projection of the selected heads: `sum_h o[n, h] @ blocks[group(h), o_h]`, as partial sums.

    Args:
        o: (N, H, D) float32.
        blocks: (G, 2r+2, D, C).
    Returns: partials (S, N, C) float32, S of the backend's choice. The bias is added by add_norm.
    """
    G, parts, D, C = blocks.shape
    r = (parts - 2) // 2
    keep = _head_mask(heads, G * r, o.device)
    rows = dequantized(blocks[:, r + 2 :]).reshape(G * r, D, C)
    o = torch.where(keep[None, :, None], o, torch.zeros_like(o))
    return torch.einsum("bhd,hdc->bc", o, rows)[None]


def mlp(
    x: Tensor,
    rows: Weight,
    bias: Tensor | None,
    neurons: Selection = None,
    tokens: Tokens | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
    activate_up: bool = False,
    skip_zeros: bool = False,
    rows_read: Tensor | None = None,
) -> Tensor:
    """The whole MLP over the selected neurons, one pass: `sum_i act(fc1_i . x + b_i) * fc2_i`, as partial sums.

    Gated: `act(gate_i . x) * up_i . x` in place of the activation (with `activate_up`, `act(up_i . x)`).

    Args:
        x: (N, C) float32, the normalised input of this layer's MLP.
        rows: (I, 2, C), or gated (I, 3, C).
        bias: (I,) float32 of fc1, gated (I, 2) of gate and up; or None. The down bias is added by add_norm.
        neurons: selection over the I neurons.
        skip_zeros: never read the fc2 row (gated: up and down rows) of a neuron whose activation is zero for
            every token. Adding zero times a row changes nothing, so the result is the same.
        rows_read: (R,) int64, R = 2 or 3, mutated: the rows of each kind read in this call are added.
    Returns: partials (S, N, C) float32, S of the backend's choice.
    """
    rows, bias, total = _select_rows(rows, bias, neurons)
    gated = rows.shape[1] == 3
    weights = dequantized(rows)
    bias = (
        torch.zeros(rows.shape[0], rows.shape[1] - 1, device=x.device)
        if bias is None
        else bias.view(total, rows.shape[1] - 1)
    )
    h = activate(x @ weights[:, 0].T + bias[:, 0], activation, threshold)
    if tokens is not None:
        h[tokens.live() :] = 0
    open_rows = (h != 0).any(0)
    counts = [total, int(open_rows.sum()) if skip_zeros else total]
    if gated:
        up = x @ weights[:, 1].T + bias[:, 1]
        h = h * (activate(up, activation, threshold) if activate_up else up)
        counts.append(int((h != 0).any(0).sum()) if skip_zeros else total)
    if rows_read is not None:
        rows_read += torch.tensor(counts, device=rows_read.device)
    return (h @ weights[:, -1])[None]


def select_threshold(
    scores: Tensor, threshold: float, capacity: int, tokens: Tokens | None = None
) -> tuple[Tensor, Tensor]:
    """Select the units whose score reaches a threshold for some token; of too many, the best.

    With `best = scores.amax(0)`: every unit with `best >= threshold`, or where these are more than `capacity`,
    the `capacity` of them with the largest `best`, equal ones by lower index.

    Args:
        scores: (N, U) float32, no NaN.
        capacity: places in the selection, at least 1.
    Returns: idx (capacity,) int32, sorted and unique in its first `count` entries, undefined after them; count (1,)
        int32. Both on the scores' device.
    """
    best = _live(scores, tokens).amax(0)
    order = torch.sort(best, descending=True, stable=True).indices
    chosen = order[best[order] >= threshold][:capacity].sort().values.int()
    idx = torch.zeros(capacity, dtype=torch.int32, device=scores.device)
    idx[: chosen.numel()] = chosen
    return idx, torch.tensor([chosen.numel()], dtype=torch.int32, device=scores.device)


def select_topk(scores: Tensor, k: int, tokens: Tokens | None = None) -> tuple[Tensor, Tensor]:
    """Select for each token its `k` units with the largest scores, equal ones by lower index.

    Args:
        scores: (N, U) float32, no NaN.
        k: at least 1; all U where `k >= U`.
    Returns: the union over the tokens: idx (min(N * k, U),) int32 and count (1,) int32, as select_threshold.
    """
    order = torch.sort(_live(scores, tokens), dim=1, descending=True, stable=True).indices[:, :k]
    chosen = order.unique().int()
    idx = torch.zeros(min(len(scores) * k, scores.shape[1]), dtype=torch.int32, device=scores.device)
    idx[: chosen.numel()] = chosen
    return idx, torch.tensor([chosen.numel()], dtype=torch.int32, device=scores.device)


def _live(scores: Tensor, tokens: Tokens | None) -> Tensor:
    return scores if tokens is None else scores[: tokens.live()]


def _head_mask(heads: Selection, num_heads: int, device: torch.device) -> Tensor:
    mask = torch.full((num_heads,), heads is None, dtype=torch.bool, device=device)
    if heads is not None:
        idx, count = heads
        mask[idx[: int(count)].long()] = True
    return mask


def _select_rows(rows: Weight, bias: Tensor | None, neurons: Selection) -> tuple[Weight, Tensor | None, int]:
    if neurons is None:
        return rows, bias, rows.shape[0]
    idx = neurons[0][: int(neurons[1])].long()
    return rows[idx], None if bias is None else bias[idx], idx.numel()
