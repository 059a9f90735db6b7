"""Files and folders that are written whole or not at all, by one process at a time, and read with a clear error."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from dejavu.errors import ConfigError, DejavuError

if TYPE_CHECKING:
    from torch import Tensor


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
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def locked(folder: str | os.PathLike, *, shown: Path | None = None) -> Iterator[Path]:
    """Work in a folder that no other process works in; it is made if need be, with its parents.

    The lock is one of the operating system on the folder itself: no file is left behind, and it ends with the process,
    however that ends. Where the file system knows no locks (some network ones), a warning says so. A folder that
    was made here and is still empty in the end is removed.

    Args:
        shown: what errors call it, where it is a place of our own beside what was asked for.
    Raises: ConfigError, at once, where another process works there or the folder cannot be made.
    """
    folder, made = Path(folder), False
    shown = shown or folder
    while True:
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                made = True
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if folder.is_symlink():  # to nothing
                raise ConfigError(f"{shown}: is a link to nothing; choose another place") from None
            continue  # whoever held it removed it between two calls
        except OSError as error:
            raise _unwritable(shown, error) from error
        try:
            _lock(held, shown)
            # Whoever held it before may have removed or renamed it: then the lock is one of a folder that is gone.
            if not _is_at(held, folder):
                continue
            try:
                yield folder
            finally:
                if made and _is_at(held, folder):
                    with suppress(OSError):  # it holds something
                        folder.rmdir()
            return
        finally:
            os.close(held)


def _lock(held: int, folder: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{folder}: another process works there; wait for it to end, or choose another place"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise _unwritable(folder, error) from error
        logging.getLogger("dejavu").warning(
            f"{folder}: its file system knows no locks; see to it that no other process writes there"
        )


def _is_at(held: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held), os.stat(folder))
    except OSError:
        return False


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which appears at `out` complete, or not at all; only one process at a time makes it.

    Raises: ConfigError where something is at `out`, another process is making it, or it cannot be written.
    """
    out = Path(out)
    # What a killed process left is found by its name, and begun anew.
    with locked(out.with_name(f".{out.name}.tmp"), shown=out) as temporary:
        check_new(out)
        try:
            _empty(temporary)
            yield temporary
            os.rename(temporary, out)
        except OSError as error:
            # Failed writes name no file; a file elsewhere that cannot be read is its own error.
            if error.filename is not None and not str(error.filename).startswith(str(temporary)):
                raise
            raise _unwritable(out, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_new(out: Path) -> None:
    """Raises: ConfigError where something is at `out`."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: is there already, and nothing is overwritten; name another folder, or remove it")


def check_folder(folder: Path, *files: str) -> None:
    """Before any work: a folder that will be written to, and files in it, may be there or not, but as nothing else.

    Raises: ConfigError naming what is there.
    """
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; choose another place")
    for path in (folder / name for name in files):
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is not a file, and one is to be written there; choose another folder")


def resumable(folder: Path, file: str, what: str, *, overwrite: bool) -> Path:
    """The file in a folder, there or not, that a stopped job goes on from; makes the folder.

    Args:
        what: "profile", say: what the file is a part of.
        overwrite: remove the file, and take a folder that holds anything else.
    Raises: ConfigError where the folder cannot be written, or holds other files and not this one.
    """
    path = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            path.unlink(missing_ok=True)
        strange = not overwrite and not path.exists() and any(folder.iterdir())
    except OSError as error:
        raise _unwritable(folder, error) from error
    if strange:
        raise ConfigError(f"{folder}: holds files that are no {what}; choose another folder, or --overwrite")
    return path


def _unwritable(path: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return ConfigError(f"{path}: cannot be written ({reason}); choose another place")


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically. Raises: ConfigError as atomic_write does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; the library's files are their owner's alone
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
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
