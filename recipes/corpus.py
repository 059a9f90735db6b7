"""Text for training: documents, their tokens, and windows over these in a repeatable order."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dejavu.artifacts import atomic_write, read_json
from dejavu.errors import ConfigError

BOUNDARY = "<|endoftext|>"  # stands alone on a line between documents, and begins each of them as a token


def documents(path: str) -> Iterator[str]:
    """The documents of a text file, plain or .gz, one at a time."""
    lines: list[str] = []
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.rstrip("\n") == BOUNDARY:
                    yield "".join(lines).strip("\n")
                    lines = []
                else:
                    lines.append(line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if lines:
        yield "".join(lines).strip("\n")


def load_tokenizer(path: Path, given: str, text: str, vocab_size: int) -> Tokenizer:
    """The tokenizer at `path`; made there first where there is none.

    Args:
        given: a tokenizer.json to take; "": a byte-level BPE of `vocab_size` entries is trained on the text.
    Raises: ConfigError where it cannot be read, or lacks the boundary token.
    """
    if path.exists():
        return Tokenizer.from_file(str(path))
    if given:
        source = json.dumps(read_json(given))
    else:
        fresh = Tokenizer(models.BPE())
        fresh.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fresh.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BOUNDARY], initial_alphabet=alphabet, show_progress=False
        )
        fresh.train_from_iterator(documents(text), trainer)
        source = fresh.to_str()
    tokenizer = Tokenizer.from_str(source)
    if tokenizer.token_to_id(BOUNDARY) is None:
        raise ConfigError(f"{given}: the tokenizer has no {BOUNDARY} token; give one that has")
    with atomic_write(path) as file:
        file.write(source)
    return tokenizer


def load_tokens(path: Path, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The text as token ids, each document begun by the boundary token; made once at `path`, then mapped from it."""
    if not path.exists():
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
        boundary, texts, parts = tokenizer.token_to_id(BOUNDARY), documents(text), []
        while batch := list(islice(texts, 64)):
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.array([boundary, *e.ids], dtype) for e in encoded]
        with atomic_write(path, "wb") as file:
            np.save(file, np.concatenate(parts) if parts else np.empty(0, dtype))
    return np.load(path, mmap_mode="r")


class Windows:
    """Sequences of `length` tokens and the token after each, in an order that only the seed decides.

    Args:
        tokens: (N,) integer.
        seed: of the shuffle, a new one every pass over the text; None keeps the order.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int | None = None):
        self._tokens, self._length, self._seed = tokens, length, seed
        self._shuffle: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return (self._tokens.size - 1) // self._length

    def batch(self, first: int, count: int) -> Tensor:
        """Windows number first .. first+count-1 of endless passes: (count, length + 1) int64."""
        starts = np.array([self._order(i // len(self))[i % len(self)] for i in range(first, first + count)])
        at = starts[:, None] * self._length + np.arange(self._length + 1)
        return torch.from_numpy(self._tokens[at].astype(np.int64))

    def _order(self, number: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self))
        if self._shuffle[0] != number:
            self._shuffle = number, np.random.default_rng([self._seed, number]).permutation(len(self))
        return self._shuffle[1]
