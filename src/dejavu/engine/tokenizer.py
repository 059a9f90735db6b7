"""Text to token ids and back, by the tokenizer that lies beside the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dejavu.artifacts import read_json
from dejavu.config import ModelConfig
from dejavu.errors import CheckpointError, ConfigError
from dejavu.families import FAMILIES

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: holds one of FILES; nothing is downloaded and no code of the checkpoint runs.
        config: the model that the ids are for.
    Attributes:
        bos_id: the tokenizer's token that begins a document, or None. Whether a prompt gets it, the tokenizer's own
            settings say.
        eos_ids: the tokens that end a text: the tokenizer's own, and those of config.json and generation_config.json.
    Raises: CheckpointError where the files are missing, damaged or of an unknown kind.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        if not any((folder / name).is_file() for name in FILES):
            raise CheckpointError(f"{folder}: no tokenizer; expected one of {', '.join(FILES)}")
        from transformers import AutoConfig, AutoTokenizer

        # Left to itself AutoTokenizer judges all of config.json, of which a tokenizer needs the model's kind at most.
        kind = AutoConfig.for_model(FAMILIES.get(config.model_type, config.model_type))
        try:
            self._hf = AutoTokenizer.from_pretrained(
                folder, config=kind, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # the tokenizers library raises bare Exceptions on damaged files
            raise CheckpointError(f"{folder}: the tokenizer does not load: {' '.join(str(e).split())}") from e
        self.vocab_size = config.vocab_size
        self.bos_id, self._end = self._hf.bos_token_id, self._hf.eos_token_id
        own = set() if self._end is None else {self._end}
        self.eos_ids = frozenset(own | set(config.eos_token_ids) | _generation_eos(folder / "generation_config.json"))
        self._special = {i: str(t) for i, t in self._hf.added_tokens_decoder.items() if t.special}

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer's own settings put there, and no others.

        An empty one is the token that begins a document.
        Raises: ConfigError for a prompt that is not valid Unicode, or empty where no token begins a document.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ConfigError(f"the prompt is not valid Unicode: character {e.start + 1} is {text[e.start]!a}") from e
        # verbose=False: the engine itself says when a prompt is too long.
        ids = self._hf(text, verbose=False)["input_ids"]
        if not ids and self.bos_id is None:
            raise ConfigError("the prompt is empty, and this tokenizer has no token to begin with; give some text")
        return ids or [self.bos_id]

    @property
    def prefix_id(self) -> int:
        """What a text begins after: the token that begins a document, or for want of one the token that ends it.

        Raises: CheckpointError where there is neither.
        """
        if self.bos_id is not None:
            return self.bos_id
        if self._end is not None:
            return self._end
        if not self.eos_ids:
            raise CheckpointError("the tokenizer has no token that begins or ends a document")
        return min(self.eos_ids)

    def encode_plain(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; with `special`, after the special tokens that the tokenizer's own settings put there."""
        return self._hf(text, add_special_tokens=special, verbose=False)["input_ids"]

    def spelled(self, token_id: int) -> str:
        """How a special token is written; nothing for any other token."""
        return self._special.get(token_id, "")

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids, spaces as they are, special tokens left out or, with `special`, spelled."""
        return self._hf.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def _generation_eos(path: Path) -> set[int]:
    """The end-of-sequence ids of a generation_config.json: chat models list more there than in config.json."""
    value = read_json(path, CheckpointError).get("eos_token_id") if path.is_file() else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, found {value!r}")
    return set(ids)
