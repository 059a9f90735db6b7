"""Attention maps of a sentence, and which heads look at few tokens and which at all (Figure 4 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.errors import ConfigError
from dejavu.model.cache import KVCache
from dejavu.model.decoder import Decoder
from dejavu.model.hooks import Hooks

# A head's share of attention on this many most attended tokens tells heavy hitters from uniform heads.
TOP_TOKENS = 3


class AttentionMaps(Hooks):
    """Collects the attention weights of a prefill of T tokens into `maps` (L, H, T, T) float32.

    Args:
        cache: the one given to the prefill, row 0.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, tokens: int):
        c = decoder.config
        self._decoder, self._cache = decoder, cache
        self.maps = torch.zeros(c.num_hidden_layers, c.num_attention_heads, tokens, tokens)

    def heads(self, layer: int, y: Tensor, o: Tensor) -> Tensor:
        d, T = self._decoder, len(y)
        angles = None if self._cache.cos_sin is None else self._cache.cos_sin[:T]
        q, _, _ = d.blocks.qkv(y, d.weights.layers[layer].attn, angles)
        k = self._cache.k[layer][0, :, :T].float()
        scores = torch.einsum("gtrd,gsd->grts", q, k).flatten(0, 1) * d.scale
        distance = torch.arange(T)[:, None] - torch.arange(T)
        unseen = distance < 0
        if d.config.sliding_window is not None:
            unseen |= distance >= d.config.sliding_window
        self.maps[layer] = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return o


@dataclass
class Sentence:
    """Attention over one sentence.

    tokens: the sentence in pieces. maps: (L, H, T, T) float32. top_share: (L, H), the share of all attention that goes
    to the TOP_TOKENS most attended tokens. evenness: (L, H), the mean over tokens of the entropy of their attention
    over the largest that is possible there: 1 is uniform.
    """

    tokens: list[str]
    maps: Tensor
    top_share: Tensor
    evenness: Tensor

    def heavy(self, count: int) -> list[tuple[int, int]]:
        """(layer, head) of the heads that look most at few tokens."""
        return _largest(self.top_share, count)

    def uniform(self, count: int) -> list[tuple[int, int]]:
        """(layer, head) of the heads whose attention is most even."""
        return _largest(self.evenness, count)


def read_sentence(decoder: Decoder, ids: list[int], tokens: list[str]) -> Sentence:
    """Run a sentence through the model. Raises: ConfigError where it has too few tokens to tell heads apart, or more
    than the context."""
    low, high = 2 * TOP_TOKENS, min(decoder.config.context, 256)
    if not low <= len(ids) <= high:
        raise ConfigError(f"sentence must have {low} to {high} tokens, found {len(ids)}")
    cache = decoder.new_cache(1, len(ids))
    watch = AttentionMaps(decoder, cache, len(ids))
    decoder.prefill(torch.tensor(ids), cache, hooks=watch)
    return Sentence(tokens, watch.maps, top_share(watch.maps), evenness(watch.maps))


def top_share(maps: Tensor) -> Tensor:
    """(..., T, T) -> (...). Only the later half of the tokens asks: the first have few tokens to look at."""
    asked = maps[..., maps.shape[-1] // 2 :, :]
    return asked.sum(-2).topk(TOP_TOKENS, dim=-1).values.sum(-1) / asked.sum((-1, -2))


def evenness(maps: Tensor) -> Tensor:
    """(..., T, T) -> (...). The first token is left out: it can look at nothing but itself."""
    entropy = torch.special.entr(maps).sum(-1)[..., 1:]
    seen = (maps > 0).sum(-1)[..., 1:].clamp(min=2)
    return (entropy / seen.log()).mean(-1)


def _largest(scores: Tensor, count: int) -> list[tuple[int, int]]:
    heads = scores.shape[1]
    return [(int(at) // heads, int(at) % heads) for at in scores.flatten().topk(min(count, scores.numel())).indices]
