"""Engines over tiny random checkpoints, and the tokenizers that go with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

import dejavu

END = "<|endoftext|>"


@pytest.fixture(scope="session")
def byte_level() -> transformers.PreTrainedTokenizerFast:
    """One token a byte (257 entries), so every character beyond ASCII takes several."""
    vocab = {END: 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


@pytest.fixture(scope="session")
def byte_fallback() -> transformers.PreTrainedTokenizerFast:
    """As Llama's: words begin with U+2581, characters that are not in the vocabulary fall apart into bytes."""
    vocab = {END: 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    vocab |= {c: 257 + i for i, c in enumerate("\N{LOWER ONE EIGHTH BLOCK}abcdefghijklmnopqrstuvwxyz")}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


@pytest.fixture
def tiny_checkpoint(make_checkpoint, byte_level) -> Callable[..., Path]:
    """`make_checkpoint` with the byte_level tokenizer beside the weights."""

    def make(model_type: str = "opt", **settings) -> Path:
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        folder = make_checkpoint(model_type, **{"vocab_size": 257} | ids | settings)
        byte_level.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(params=["cpu", "reference"])
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def bundled() -> dejavu.Engine:
    """The bundled model in float32, exact."""
    return dejavu.load(dtype="fp32")
