"""Hugging Face transformers: eager, and compiled with a static cache."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from dejavu.bench.shapes import fill_noise

if TYPE_CHECKING:
    from dejavu.bench.peers import Source


def random_hugging_face(
    config: dict[str, Any], dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> PreTrainedModel:
    """Hugging Face's model of a config.json, filled with noise as bench.shapes.random_weights fills ours."""
    parsed = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed, dtype=dtype)
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    for module in list(model.modules()):
        if hasattr(module, "rotary_emb"):  # its table is not a weight: it is computed when the module is made
            module.rotary_emb = type(module.rotary_emb)(parsed).to(device)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        fill_noise(((p, p.shape[-1] ** -0.5) for p in parameters.values() if p.dim() > 1), seed)
        for name, p in parameters.items():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def load_hugging_face(folder: str | PathLike, dtype: torch.dtype) -> PreTrainedModel:
    """Hugging Face's model of a local checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


class HuggingFace:
    """Hugging Face eager, with the cache that grows: what `generate` does, without its bookkeeping."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> int:
        self._cache = DynamicCache(config=self._model.config)
        return self._next(self._model, torch.tensor([ids]))

    @torch.inference_mode()
    def step(self, token: int) -> int:
        return self._next(self._model, torch.tensor([[token]]))

    def _next(self, forward, ids: torch.Tensor, **inputs) -> int:
        out = forward(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **inputs)
        return int(out.logits[0, -1].argmax())


class CompiledHuggingFace(HuggingFace):
    """Hugging Face at its best: a static cache, and the step compiled with max-autotune over frozen weights.

    Args:
        capacity: tokens in the cache, all of which every step reads.
    """

    def __init__(self, model: PreTrainedModel, capacity: int):
        super().__init__(model)
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        # A mask of one size keeps the shapes static; what lies ahead of the token is hidden by causality.
        self._mask = torch.ones(1, capacity, dtype=torch.long)
        self._compiled = torch.compile(model, mode="max-autotune", dynamic=False)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> int:
        self._cache.reset()
        self._position = len(ids)
        return self._next(self._model, torch.tensor([ids]), **self._at(torch.arange(len(ids))))

    @torch.inference_mode()
    def step(self, token: int) -> int:
        at = self._at(torch.tensor([self._position]))
        self._position += 1
        with torch._inductor.config.patch(freezing=True):
            return self._next(self._compiled, torch.tensor([[token]]), **at)

    def _at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"position_ids": positions[None], "attention_mask": self._mask}


def formats() -> tuple[str, ...]:
    """Weight formats that are offered."""
    return "bf16", "fp32"


def build(source: Source, weights: str, name: str, capacity: int) -> HuggingFace:
    """One of the peers of this file, by name."""
    model = source.hugging_face(weights)
    return CompiledHuggingFace(model, capacity) if name == "hf-compiled" else HuggingFace(model)
