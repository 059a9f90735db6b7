"""llama.cpp through llama-cpp-python. It knows no OPT: a GPT-2 of the same sizes with random weights stands in.

GPT-2 has the same blocks, with GELU in the place of ReLU, and so reads the same bytes. The text means nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import llama_cpp
import numpy as np

from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from dejavu.bench.peers import Source

_TYPES = {
    "fp32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
_FILE = "stand-in.gguf"


def formats() -> tuple[str, ...]:
    """Weight formats that are offered: int8 is q8_0, int4 is q4_0."""
    return "bf16", "fp32", "int8", "int4"


def convert(source: Source, weights: str, folder: Path) -> None:
    """Write the stand-in into a folder, tensor by tensor."""
    c = source.config
    C, F, V, L = c["hidden_size"], c["ffn_dim"], c["vocab_size"], c["num_hidden_layers"]
    if C % 32 or F % 32:
        raise ConfigError(f"peer llama-cpp needs sizes that are multiples of 32, found {C} and {F}")
    writer = gguf.GGUFWriter(str(folder / _FILE), "gpt2")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(F)
    writer.add_block_count(L)
    writer.add_head_count(c["num_attention_heads"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(V)

    # Made, and quantised, once a shape: what is read is as many bytes whatever they hold.
    random, made = np.random.default_rng(source.seed), {}

    def matrix(name: str, rows: int, columns: int) -> None:
        if (rows, columns) not in made:
            noise = random.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
            made[rows, columns] = gguf.quants.quantize(noise, _TYPES[weights])
        writer.add_tensor(f"{name}.weight", made[rows, columns], raw_dtype=_TYPES[weights])

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, dtype=np.float32))

    def norm(name: str) -> None:
        vector(f"{name}.weight", C, 1)
        vector(f"{name}.bias", C, 0)

    matrix("token_embd", V, C)
    matrix("output", V, C)
    writer.add_tensor(
        "position_embd.weight", random.standard_normal((c["max_position_embeddings"], C), dtype=np.float32)
    )
    norm("output_norm")
    for layer in (f"blk.{i}" for i in range(L)):
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
        for name, rows, columns in (
            ("attn_qkv", 3 * C, C),
            ("attn_output", C, C),
            ("ffn_up", F, C),
            ("ffn_down", C, F),
        ):
            matrix(f"{layer}.{name}", rows, columns)
            vector(f"{layer}.{name}.bias", rows, 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder: Path, weights: str, *, capacity: int, threads: int) -> LlamaCpp:
    """The stand-in, ready to decode."""
    return LlamaCpp(folder / _FILE, capacity, threads)


class LlamaCpp:
    """One sequence, greedily, over the library's C interface: what its own programs call."""

    def __init__(self, path: Path, capacity: int, threads: int):
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False  # weights of its own, which it may lay out anew for its kernels
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"{path} cannot be loaded")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = capacity
        context.n_threads = context.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"{path}: no context for {capacity} tokens")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, ids: Sequence[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self._decode(ids)

    def step(self, token: int) -> int:
        return self._decode([token])

    def _decode(self, ids: Sequence[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if code := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode gave {code}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def __del__(self):
        for free, made in ((llama_cpp.llama_free, "_context"), (llama_cpp.llama_model_free, "_model")):
            if getattr(self, made, None):
                free(getattr(self, made))


@llama_cpp.llama_log_callback
def _quiet(level, text, data) -> None:
    """The library tells of every tensor that it reads."""
