"""Named shapes: the config.json of public checkpoints, and random weights to fill them.

Random weights show speed, never quality.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from dejavu.bench.names import check_name
from dejavu.checkpoint.layout import Quantization, Weights, allocate, require_weight_memory
from dejavu.config import ModelConfig
from dejavu.errors import ConfigError
from dejavu.families import parse  # noqa: F401  (shapes.parse)
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import LINE, Quantized, RowFormat, Weight, quantize

# A prime, so that no two rows of a model are filled from the same place of the noise.
_NOISE = 8_388_593


def _opt(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "activation_function": "relu",
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "do_layer_norm_before": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **other,
    }


# facebook/opt-*, of which 175b is described in the paper only (arXiv 2205.01068), and SparseLLM/ReluLLaMA-7B
SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b-relu": {
        "model_type": "llama",
        "hidden_act": "relu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def shape(name: str) -> dict[str, Any]:
    """The config.json of a named shape. Raises: ConfigError naming those that exist."""
    return SHAPES[check_name("shape", name, SHAPES)]


def fill_noise(tensors: Iterable[tuple[Tensor, float]], seed: int) -> None:
    """Fill tensors (mutated) with normal noise of the given standard deviations, at the speed of memory.

    One block of noise is repeated over all of them, each beginning where the one before ended.
    """
    noise, at = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed)), 0
    blocks: dict[tuple[torch.device, torch.dtype, float], Tensor] = {}
    for tensor, std in tensors:
        key = (tensor.device, tensor.dtype, std)
        if key not in blocks:
            blocks[key] = (noise * std).to(tensor.device, tensor.dtype)
        flat, done = tensor.view(-1), 0
        while done < flat.numel():
            count = min(_NOISE - at, flat.numel() - done)
            flat[done : done + count] = blocks[key][at : at + count]
            done, at = done + count, (at + count) % _NOISE


def fill_quantized(matrix: Quantized, std: float, seed: int = 0) -> None:
    """Fill int8 or int4 rows (mutated) with uniform levels of the given standard deviation, without a plain copy."""
    generator = torch.Generator(matrix.device).manual_seed(seed)
    noise = torch.randint(256, (_NOISE,), dtype=torch.uint8, device=matrix.device, generator=generator)
    flat = matrix.data.view(-1)
    for first in range(0, flat.numel(), _NOISE):
        flat[first : first + _NOISE] = noise[: min(_NOISE, flat.numel() - first)]
    values, scales, offsets = matrix.parts()
    matrix.data[..., values.shape[-1] :] = 0
    if matrix.width % LINE:  # values of the padding, by quantising a row of ones that ends where the rows do
        used = quantize(torch.ones(1, matrix.width), RowFormat(8)).parts()[0].bool()
        mask = used.unflatten(1, (-1, 2, LINE // 2)).to(torch.uint8) * 15
        packed = (mask[:, :, 0] | mask[:, :, 1] << 4).flatten(1)
        keep = used.to(torch.uint8).mul(255) if matrix.format.bits == 8 else packed
        values &= keep.to(matrix.device)
    levels = 2**matrix.format.bits
    scale = std / ((levels**2 - 1) / 12) ** 0.5
    scales.fill_(scale)
    if offsets is not None:
        offsets.fill_(-scale * (levels - 1) / 2)


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    ops: Backend,
    seed: int = 0,
    mlp_density: float = 0.5,
    quantization: Quantization | None = None,
) -> Weights:
    """Random weights in kernel layout, scaled so that every activation stays near unit size.

    Args:
        ops: the kernel backend, whose `empty` allocates.
        mlp_density: about this share of a ReLU MLP's neurons is active for any token. Normalised inputs make
            normal pre-activations, so a bias of the right size does it.
        quantization: random bytes are made directly, never a plain copy first.
    Raises: ConfigError for a density outside (0, 1), or other than 0.5 where the MLP has no bias; CapacityError for
        weights larger than the free memory.
    """
    if not 0 < mlp_density < 1:
        raise ConfigError(f"mlp_density must be between 0 and 1, found {mlp_density}")
    if mlp_density != 0.5 and not config.mlp_bias:
        raise ConfigError(f"mlp_density {mlp_density} needs an MLP with a bias; this shape has none: use 0.5")
    require_weight_memory(config, dtype, quantization, ops.device, "random weights")
    with torch.no_grad():
        weights = allocate(config, dtype, ops.empty, quantization)
        matrices = list(_matrices(config, weights))
        fill_noise(((m, std) for m, std in matrices if not isinstance(m, Quantized)), seed)
        for number, (matrix, std) in enumerate(matrices):
            if isinstance(matrix, Quantized):
                fill_quantized(matrix, std, seed + number)
        for layer in weights.layers:
            for tensor in (layer.attn.qkv_bias, layer.attn.out_bias, layer.mlp.in_bias, layer.mlp.out_bias):
                if tensor is not None:
                    tensor.zero_()
            if layer.mlp.in_bias is not None:
                layer.mlp.in_bias.fill_(NormalDist().inv_cdf(mlp_density))
        for norm in (weights.final_norm, *(n for layer in weights.layers for n in (layer.attn_norm, layer.mlp_norm))):
            if norm.weight is not None:
                norm.weight.fill_(1)
            if norm.bias is not None:
                norm.bias.zero_()
    return weights


def _matrices(config: ModelConfig, weights: Weights) -> Iterable[tuple[Weight, float]]:
    """Every matrix with a standard deviation that keeps its outputs near unit size."""
    unit = config.hidden_size**-0.5
    yield weights.embed, config.embed_size**-0.5
    if weights.head is not weights.embed:
        yield weights.head, config.embed_size**-0.5
    for tensor in (weights.position_table, weights.project_in, weights.project_out):
        if tensor is not None:
            yield tensor, unit
    for layer in weights.layers:
        yield layer.attn.blocks, unit
        yield layer.mlp.rows, unit
