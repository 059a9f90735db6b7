"""Hashes of checkpoints, remembered so that a start need not read every byte of the weights.

One small file a checkpoint in the user's cache (`$XDG_CACHE_HOME/dejavu/hashes`, or in `~/.cache`), so that processes
that write at once lose nothing of each other's. A hash is believed while every file is the one that was read: the same
name, inode, size, and times of its last change and of its last change of any kind (ctime, which no program can set:
a file replaced by one of equal size and date is still noticed). It guards against mistakes, a pack for other weights,
not against malice: whoever can write the user's cache can write the pack as well.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dejavu.artifacts import read_json, write_json
from dejavu.errors import DejavuError

# Within the resolution of a file system's clock (2 s on FAT) a second change would leave the times as they are.
SETTLED_NS = 2_000_000_000


def remembered(folder: Path, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """What `compute` gave for these files of a folder, or gives now. A cache that cannot be used is none."""
    now, before = time.time_ns(), _stats(files)
    entry = cache_folder() / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
    try:
        saved = read_json(entry)
        if saved.get("files") == before and _is_hash(saved.get("hash")):
            return saved["hash"]
    except DejavuError:
        pass  # absent or damaged: it is written anew
    found = compute()
    settled = all(max(times) < now - SETTLED_NS for _, _, *times in before.values())
    if settled and _stats(files) == before:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_json(entry, {"folder": str(folder.resolve()), "files": before, "hash": found})
        except (OSError, DejavuError, ValueError):
            pass  # a read-only or full home: the next start reads everything again
    return found


def cache_folder() -> Path:
    """Where hashes are remembered: in DEJAVU_CACHE if that is set, else in the user's cache."""
    if "DEJAVU_CACHE" in os.environ:
        return Path(os.environ["DEJAVU_CACHE"]) / "hashes"
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "dejavu" / "hashes"


def _stats(files: Iterable[Path]) -> dict[str, list[int]]:
    """Of each file, by name: inode, size, and the times of its last change, in nanoseconds."""
    stats = {file.name: file.stat() for file in sorted(files)}
    return {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()}


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
