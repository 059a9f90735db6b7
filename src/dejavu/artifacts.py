"""Files that are written whole or not at all, and read with a clear error."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from dejavu.errors import ConfigError, DejavuError


@contextmanager
def atomic_write(path: str | os.PathLike, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """Write a file that appears at `path` complete, or not at all: an error in the block leaves no trace.

    Args:
        path: replaced if it exists (a link's target, not the link); its folder must exist.
        mode: "w" for UTF-8 text, "wb" for bytes.
    Raises: ConfigError where the target cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: cannot be written (not a regular file); choose another place")
    # In the same folder, because a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Failed writes name no file, unlike a failed open of some other file inside the block.
        if error.filename not in (None, str(temporary)):
            raise
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def to_json(data: Any, **how: Any) -> str:
    """JSON that every parser reads: a number that is not finite, for which JSON has no word, is null.

    how: as json.dumps takes it.
    """
    return json.dumps(_finite(data), allow_nan=False, **how)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def write_json(path: str | os.PathLike, data: dict) -> None:
    """Write an object as indented JSON (`to_json`), atomically. Raises: ConfigError as atomic_write does."""
    text = to_json(data, indent=2)
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_json(path: str | os.PathLike, error: type[DejavuError] = ConfigError) -> dict:
    """Read a JSON object. Raises: `error`, naming the file, where it is missing or is not a JSON object."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause})") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: expected JSON, but it cannot be parsed ({cause})") from cause
    if not isinstance(data, dict):
        raise error(f"{path}: expected a JSON object, found a {type(data).__name__}")
    return data
