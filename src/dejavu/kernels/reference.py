"""What every op means, in plain PyTorch. The other backends are tested against this file.

One decode step works on `B` rows (sequences) of one token each. All activations are float32; weights
are float32, bfloat16, float16 or quantised (quantized.py: an op computes with what `dense` makes of them); norms and
biases are float32; index and position tensors are int32.

Weights lie as the decode step reads them (docs/architecture.md):

- MLP `rows`: `(I, 2, C)` = fc1 row, fc2 column; gated `(I, 3, C)` = gate, up, down.
- attention `blocks`: `(G, 2r+2, D, C)` with `r = H / G` query heads a group, in the order
  `q_0..q_{r-1}, k, v, o_0..o_{r-1}`, `o` being the transposed output projection. Without grouped heads
  this is `(H, 4, D, C)`.

Ops that sum over many rows (`attn_out`, `mlp`) return *partial sums* `(S, B, C)`: a backend splits the
rows into slices that depend on the shapes alone, and `add_norm` adds the slices in order. So a result
does not depend on the number of threads, on timing or on which other rows are in the batch.

A selection is a pair `(idx, count)`: `idx` int32 of fixed capacity, sorted and unique in its first
`count[0]` entries; `count` int32 of shape (1,), on the device. `None` selects everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.quantized import Weight, dense

Selection = tuple[Tensor, Tensor] | None


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


def embed(ids: Tensor, table: Weight) -> Tensor:
    """Look up token embeddings.

    Args:
        ids: (B,) int32, in [0, V).
        table: (V, E).
    Returns: (B, E) float32.
    """
    return dense(table[ids.long()])


def add_positions(x: Tensor, positions: Tensor, table: Tensor, offset: int) -> None:
    """Add learned positions in place: `x[b] += table[positions[b] + offset]`. x: (B, C); table: (N, C)."""
    x += table[(positions + offset).long()].float()


def add_norm(
    x: Tensor,
    partials: Tensor | None,
    partial_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
) -> Tensor:
    """Add partial sums to the residual stream, then normalise: `x += bias_p + sum_s partials[s]; y = norm(x)`.

    Args:
        x: (B, C) float32, mutated.
        partials: (S, B, C) float32, added in the order of S; or None.
        partial_bias: (C,) float32 or None.
        weight, bias: (C,) float32 affine parameters, or None.
        kind: "layer", "rms" or "none" (y is a copy of x).
    Returns: y (B, C) float32.
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


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Dense rows: `x @ weight.T + bias`. x: (B, C) float32; weight: (N, C); returns (B, N) float32.

    Reads N*C weights once for the whole batch; accumulates in float32.
    """
    return F.linear(x, dense(weight), bias)


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
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Selection = None,
    *,
    hidden: Tensor | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Project queries of the selected heads, and append keys and values to the cache.

    With `hidden` and `kv_len` None, the key and value of every group are written at `positions[b]`.
    Otherwise keys and values are lazy: `x[b]` is stored at `hidden[b, positions[b] % P]`; for each group
    with a selected head, and each group that now has P tokens pending, the keys and values of all its
    pending tokens `kv_len[b, g] .. positions[b]` are projected from `hidden`, and `kv_len[b, g]` becomes
    `positions[b] + 1`. No more than P tokens are ever pending.

    Args:
        x: (B, C) float32, the normalised input of this layer's attention.
        blocks: (G, 2r+2, D, C), see the module's docstring.
        bias: (G, r+2, D) float32 in the order q_0.., k, v; or None.
        cos_sin: (N, D) float32 rotary table, row = position; None for learned positions.
        positions: (B,) int32, the position of each row's token, below S.
        k_cache, v_cache: (B, G, S, D), mutated.
        heads: selection over the H query heads.
        hidden: (B, P, C) float32 ring of normalised inputs, mutated.
        kv_len: (B, G) int32, tokens already projected, mutated.
    Returns: q (B, H, D) float32; rows of heads that are not selected are undefined.
    """
    G, parts, D, _ = blocks.shape
    r = (parts - 2) // 2
    selected = _head_mask(heads, G * r, x.device).view(G, r)

    def project(rows: Tensor, group: int, part: int) -> Tensor:
        out = rows @ dense(blocks[group, part]).T
        return out if bias is None else out + bias[group, part]

    q = torch.zeros(x.shape[0], G * r, D, dtype=torch.float32, device=x.device)
    for b, position in enumerate(positions.tolist()):
        if hidden is not None:
            hidden[b, position % hidden.shape[1]] = x[b]
        for g in range(G):
            for j in range(r):
                if selected[g, j]:
                    row = project(x[b : b + 1], g, j)[0]
                    q[b, g * r + j] = row if cos_sin is None else rotate(row, cos_sin[position])
            first = position
            if hidden is not None:
                first = int(kv_len[b, g])
                if not selected[g].any() and position + 1 - first < hidden.shape[1]:
                    continue
                kv_len[b, g] = position + 1
            tokens = torch.arange(first, position + 1, device=x.device)
            rows = x[b : b + 1] if hidden is None else hidden[b, tokens % hidden.shape[1]]
            k = project(rows, g, r)
            k = k if cos_sin is None else rotate(k, cos_sin[tokens])
            k_cache[b, g, tokens] = k.to(k_cache.dtype)
            v_cache[b, g, tokens] = project(rows, g, r + 1).to(v_cache.dtype)
    return q


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    heads: Selection = None,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of one query a row over that row's cache, positions 0 .. positions[b].

    Args:
        q: (B, H, D) float32.
        k_cache, v_cache: (B, G, S, D).
        window: sliding window; only the last `window` positions are attended.
    Returns: (B, H, D) float32; rows of heads that are not selected are undefined.
    Reads `2 * (positions[b] + 1) * D` cache elements for each row and group with a selected head.
    """
    B, H, _ = q.shape
    r = H // k_cache.shape[1]
    selected = _head_mask(heads, H, q.device)
    out = torch.zeros_like(q)
    for b in range(B):
        end = int(positions[b]) + 1
        start = 0 if window is None else max(0, end - window)
        for h in torch.nonzero(selected).flatten().tolist():
            k, v = k_cache[b, h // r, start:end].float(), v_cache[b, h // r, start:end].float()
            out[b, h] = torch.softmax(k @ q[b, h] * scale, 0) @ v
    return out


def attn_out(o: Tensor, blocks: Weight, heads: Selection = None) -> Tensor:
    """Output projection of the selected heads: `sum_h o[b, h] @ blocks[group(h), o_h]`, as partial sums.

    Args:
        o: (B, H, D) float32.
        blocks: (G, 2r+2, D, C).
    Returns: partials (S, B, C) float32, S of the backend's choice. The bias is added by add_norm.
    """
    G, parts, D, C = blocks.shape
    r = (parts - 2) // 2
    keep = _head_mask(heads, G * r, o.device)
    rows = dense(blocks[:, r + 2 :]).reshape(G * r, D, C)
    o = torch.where(keep[None, :, None], o, torch.zeros_like(o))
    return torch.einsum("bhd,hdc->bc", o, rows)[None]


def mlp(
    x: Tensor,
    rows: Weight,
    bias: Tensor | None,
    neurons: Selection = None,
    *,
    activation: str,
    threshold: float = 0.0,
    activate_up: bool = False,
    exact: bool = False,
    rows_read: Tensor | None = None,
) -> Tensor:
    """The whole MLP over the selected neurons, one pass: `sum_i act(fc1_i . x + b_i) * fc2_i`, as partial sums.

    Gated: `act(gate_i . x) * up_i . x` in place of the activation (with `activate_up`, `act(up_i . x)`).

    Args:
        x: (B, C) float32, the normalised input of this layer's MLP.
        rows: (I, 2, C), or gated (I, 3, C).
        bias: (I,) float32 of fc1, gated (I, 2) of gate and up; or None. The down bias is added by add_norm.
        neurons: selection over the I neurons.
        exact: never read the fc2 row (gated: up and down rows) of a neuron whose activation is zero for
            every row of the batch. Adding zero times a row changes nothing, so the result is the same.
        rows_read: (R,) int64, R = 2 or 3, mutated: the rows of each kind read in this call are added.
    Returns: partials (S, B, C) float32, S of the backend's choice.
    """
    rows, bias, total = _select_rows(rows, bias, neurons)
    gated = rows.shape[1] == 3
    weights = dense(rows)
    bias = (
        torch.zeros(rows.shape[0], rows.shape[1] - 1, device=x.device)
        if bias is None
        else bias.view(total, rows.shape[1] - 1)
    )
    h = activate(x @ weights[:, 0].T + bias[:, 0], activation, threshold)
    open_rows = (h != 0).any(0)
    counts = [total, int(open_rows.sum()) if exact else total]
    if gated:
        up = x @ weights[:, 1].T + bias[:, 1]
        h = h * (activate(up, activation, threshold) if activate_up else up)
        counts.append(int((h != 0).any(0).sum()) if exact else total)
    if rows_read is not None:
        rows_read += torch.tensor(counts, device=rows_read.device)
    return (h @ weights[:, -1])[None]


def select_threshold(scores: Tensor, threshold: float, capacity: int) -> tuple[Tensor, Tensor]:
    """Select the units whose score reaches a threshold in some row of the batch; of too many, the best.

    With `best = scores.amax(0)`: every unit with `best >= threshold`, or where these are more than `capacity`,
    the `capacity` of them with the largest `best`, equal ones by lower index.

    Args:
        scores: (B, N) float32, no NaN.
        capacity: places in the selection, at least 1.
    Returns: idx (capacity,) int32, sorted and unique in its first `count` entries, undefined after them; count (1,)
        int32. Both on the scores' device.
    """
    best = scores.amax(0)
    order = torch.sort(best, descending=True, stable=True).indices
    chosen = order[best[order] >= threshold][:capacity].sort().values.int()
    idx = torch.zeros(capacity, dtype=torch.int32, device=scores.device)
    idx[: chosen.numel()] = chosen
    return idx, torch.tensor([chosen.numel()], dtype=torch.int32, device=scores.device)


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select for each row of the batch its `k` units with the largest scores, equal ones by lower index.

    Args:
        scores: (B, N) float32, no NaN.
        k: at least 1; all N where `k >= N`.
    Returns: the union over the rows: idx (min(B * k, N),) int32 and count (1,) int32, as select_threshold.
    """
    B, N = scores.shape
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    chosen = order.unique().int()
    idx = torch.zeros(min(B * k, N), dtype=torch.int32, device=scores.device)
    idx[: chosen.numel()] = chosen
    return idx, torch.tensor([chosen.numel()], dtype=torch.int32, device=scores.device)


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
