"""A tiny model with a tokenizer, profiled on a little text."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"word{i}" for i in range(98)]


@pytest.fixture
def model(make_checkpoint):
    """`model(model_type, **config)`: the folder of a tiny checkpoint whose tokens are the words of `text`."""

    def make(model_type: str = "opt", **overrides) -> Path:
        folder = make_checkpoint(model_type, **overrides)
        vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        fast.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def text(tmp_path) -> str:
    """A file of 1200 tokens in three documents."""
    file = tmp_path / "text.txt"
    words = [WORDS[(i * i + i // 7) % len(WORDS)] for i in range(1200)]
    file.write_text("\n<|endoftext|>\n".join(" ".join(words[i : i + 400]) for i in range(0, 1200, 400)))
    return str(file)
