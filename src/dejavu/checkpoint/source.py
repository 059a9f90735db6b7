"""Where a checkpoint comes from and what it holds: its config, its tensors' headers, its tensors in pieces.

Files are mapped, and pages of a mapped file count as memory of the process once they are read. So
tensors are handed out in small pieces, and the file is mapped anew whenever enough of it was read: loading
never needs much more memory than what is loaded.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dejavu.artifacts import read_json
from dejavu.checkpoint.remember import remembered
from dejavu.errors import CapacityError, CheckpointError, ConfigError

BUNDLED = "opt-mini"
CONFIG = "config.json"
# In the order of preference; an index beside a file of the same stem names its shards.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SMALL_FILES = (CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
BYTES = "U8"  # of quantised rows
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# A piece and where it goes stay in the second-level cache, which transposing copies need.
PIECE_BYTES = 2 << 20
# A file is mapped anew after this share of the checkpoint was read, or after this many bytes if that is more.
REMAP_SHARE, REMAP_BYTES = 1 / 50, 4 << 20


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without reading it. `dtype` is PyTorch's name, or the file's own where unusable."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A folder in Hugging Face's format. Nothing of it is executed; tensors are read at use.

    Args:
        path: the folder.
        name: how it is called in messages and records.
    Attributes: `config`, the parsed config.json.
    Raises: CheckpointError where config.json is missing or is not a JSON object.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.config = read_json(path / CONFIG, CheckpointError)

    @cached_property
    def headers(self) -> dict[str, Header]:
        """The header of every tensor by its name, file after file.

        Raises: CheckpointError for files that are missing, cut off, damaged or refused.
        """
        for single in WEIGHT_FILES:
            if (self.path / single).exists():
                return _read_headers(self.path / single)
            index = self.path / f"{single}.index.json"
            if index.exists():
                return self._sharded(index)
        raise CheckpointError(f"{self.path}: holds no weights; expected {' or '.join(WEIGHT_FILES)}, or their index")

    def _sharded(self, index: Path) -> dict[str, Header]:
        shard_of = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(shard_of, dict) or not all(
            isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values()
        ):
            raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names of the same folder")
        shards = sorted(set(shard_of.values()))
        missing = [shard for shard in shards if not (self.path / shard).exists()]
        if missing:
            raise CheckpointError(f"{index}: names files that are missing: {', '.join(missing)}; download them again")
        found = [pair for shard in shards for pair in _read_headers(self.path / shard).items()]
        return {name: header for name, header in found if shard_of.get(name) == header.file.name}

    def tensors(self, units: dict[str, int]) -> Iterator[tuple[str, int, Tensor]]:
        """Read tensors in the order given, in pieces of a few megabytes.

        Args:
            units: tensor name -> the number of rows that must come together; pieces hold a multiple of it.
        Yields: (name, first row, rows). Rows are views of a mapped file: copy from them, do not keep them.
        """
        size = sum(file.stat().st_size for file in {header.file for header in self.headers.values()})
        opened, seen, limit = None, 0, max(REMAP_BYTES, size * REMAP_SHARE)
        for name, unit in units.items():
            file, (total, *_) = self.headers[name].file, self.headers[name].shape or (1,)
            first = 0
            while first < total:
                if opened != file or seen > limit:
                    read, opened, seen = _open(file), file, 0
                tensor = read(name)
                step = unit * max(1, PIECE_BYTES * total // max(1, tensor.nbytes * unit))
                rows = (tensor if tensor.dim() else tensor[None])[first : first + step]
                seen += rows.nbytes
                yield name, first, rows
                first += step

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of config.json and every tensor by name: the same however the files are sharded.

        Remembered, see checkpoint.remember, because reading every byte takes long.
        """
        files = {self.path / CONFIG, *(header.file for header in self.headers.values())}
        return remembered(self.path, files | set(self.path.glob("*.index.json")), self._read_hash)

    def _read_hash(self) -> str:
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for name, first, rows in self.tensors(dict.fromkeys(sorted(self.headers), 1)):
            if first == 0:
                header = self.headers[name]
                digest.update(f"\n{name} {header.dtype} {header.shape}\n".encode())
            digest.update(rows.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def open_checkpoint(name: str | os.PathLike, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, downloading it if it is not here yet.

    Args:
        name: a local folder; an id on the Hugging Face Hub; or "opt-mini", the bundled model.
        revision: branch, tag or commit, of a hub id only.
    Raises: CheckpointError where there is none of that name, or it has no valid config.json; ConfigError for a
        revision of something that is not on the hub.
    """
    name = os.fspath(name)
    folder = Path(__file__).parents[1] / "assets" / BUNDLED if name == BUNDLED else Path(name).expanduser()
    if not name or not (name == BUNDLED or folder.exists()):
        return Checkpoint(_download(name, revision), name)
    if revision is not None:
        raise ConfigError(f"{name}: revision {revision!r} applies to hub ids only, and this is a local folder")
    if folder.is_file():
        raise CheckpointError(f"{name}: expected a folder with {CONFIG} and weights, found a file")
    return Checkpoint(folder, folder.resolve().name)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def fetch(*patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=[*SMALL_FILES, *patterns], ignore_patterns=["*/*"]
            )
        )

    try:
        path = fetch("model*.safetensors", "model.safetensors.index.json")
        if not any(path.glob("model*.safetensors")):
            path = fetch("pytorch_model*.bin", "pytorch_model.bin.index.json")
    except HFValidationError as error:
        raise CheckpointError(f"{name!r}: there is no such folder, and it is not a hub id (owner/model)") from error
    except Exception as error:  # whichever library the hub client speaks HTTP with has its own errors
        raise CheckpointError(
            f"{name!r}: there is no such folder, and the Hugging Face Hub did not deliver it ({_first_line(error)})"
        ) from error
    return path


def _open(file: Path):
    """A function from tensor names to tensors that are views of the mapped file."""
    return _load_bin(file).__getitem__ if file.suffix == ".bin" else _open_safetensors(file).get_tensor


def _read_headers(file: Path) -> dict[str, Header]:
    if file.suffix == ".bin":
        return {
            name: Header(file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in _load_bin(file).items()
        }
    opened = _open_safetensors(file)
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is not a dict
    return {
        name: Header(file, tuple(s.get_shape()), DTYPE_NAMES.get(s.get_dtype(), s.get_dtype()))
        for name, s in slices.items()
    }


def _open_safetensors(file: Path):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    except RuntimeError as error:
        # PyTorch maps files so that the system counts them as memory, and may refuse more than the machine has.
        raise CapacityError(
            f"{file}: the system does not map {file.stat().st_size / 1e9:.0f} GB at once ({_first_line(error)}); "
            "save the model in shards"
        ) from error


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to switch the protection off.
        raise CheckpointError(
            f"{file}: refused, because it holds more than plain tensors and loading it could run code; "
            "get the model in safetensors format"
        ) from error
    except Exception as error:  # the restricted unpickler meets damaged bytes with every kind of error
        raise _damaged(file, error) from error
    if not isinstance(state, dict) or not all(type(k) is str and isinstance(t, Tensor) for k, t in state.items()):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, found other values in it")
    return state


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: damaged or cut off ({_first_line(error)}); download or copy it again")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
