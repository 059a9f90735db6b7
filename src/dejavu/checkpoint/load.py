"""From a checkpoint's tensors to the kernel layout: everything is checked first, then copied piece by piece."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from types import MappingProxyType

from dejavu.checkpoint.slots import Slot
from dejavu.checkpoint.source import BYTES, DTYPE_NAMES, Checkpoint
from dejavu.device import parse_dtype, warn_once
from dejavu.errors import CheckpointError
from dejavu.progress import Progress, silent

# A wrong model_type makes every tensor wrong; past this many names a list says nothing more.
NAMES_SHOWN = 20
# In the name of a tensor of a layer, saved quantised or not.
LAYER = r"(^|\.)layers\.\d+\."


def match(
    checkpoint: Checkpoint,
    slots: dict[str, Slot],
    *,
    prefixes: Iterable[str] = ("",),
    ignored: Iterable[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
    dtypes: Iterable[str] = tuple(DTYPE_NAMES.values()),
) -> dict[str, str]:
    """Find the tensor of every slot, from the headers alone.

    Args:
        slots: by tensor name without prefix; only their shapes matter here.
        prefixes: what may stand before a tensor's name, "" included.
        dtypes: that tensors may have.
        ignored: regular expressions of tensors that may be there and are not read.
        renamed: tensor name -> slot that it goes to, where these differ.
    Returns: tensor name -> slot name, in the order of the files.
    Raises: CheckpointError listing every tensor that is missing, unexpected inside a layer (it would change what that
        computes), wrongly shaped or of an unsupported dtype. What else is unexpected, a value head say, is warned of.
    """
    found, filled, unexpected, twice = {}, set(), [], set()
    for name in checkpoint.headers:
        bare = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
        bare = [renamed[name]] if name in renamed else bare
        slot = next((b for b in bare if b in slots and b not in filled), None)
        if slot is not None:
            found[name] = slot
            filled.add(slot)
        elif not any(re.search(pattern, name) for pattern in ignored):
            unexpected.append(name)
            twice |= {name} if any(b in slots for b in bare) else set()
    headers = {name: checkpoint.headers[name] for name in found}
    missing = [f"{name} {slot.shape}" for name, slot in slots.items() if name not in filled]
    problems = {
        "missing": missing,
        "unexpected": [name for name in unexpected if missing or name in twice or re.search(LAYER, name)],
        "wrongly shaped": [
            f"{name} (expected {slots[found[name]].shape}, found {header.shape})"
            for name, header in headers.items()
            if header.shape != slots[found[name]].shape
        ],
        f"of an unsupported dtype (supported: {', '.join(dtypes)})": [
            f"{name} (found {header.dtype})" for name, header in headers.items() if header.dtype not in dtypes
        ],
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(names)} {kind}: {_shorten(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{checkpoint.path}: the tensors are not those that config.json describes: {lists}")
    if unexpected:
        warn_once(f"{checkpoint.path}: {len(unexpected)} tensors are not part of the model: {_shorten(unexpected)}")
    return found


def stored_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """The dtype that most bytes of these tensors are stored in."""
    size = Counter()
    for name in names:
        size[checkpoint.headers[name].dtype] += _nbytes(checkpoint, name)
    return size.most_common(1)[0][0]


def fill(checkpoint: Checkpoint, slots: dict[str, Slot], names: dict[str, str], progress: Progress = silent) -> None:
    """Copy every tensor into its slot, converting the dtype, with a few megabytes of memory on top.

    Args:
        slots: mutated.
        names: tensor name -> slot name, as `match` returned them.
        progress: in bytes, told after every piece.
    """
    done, total = 0, sum(_nbytes(checkpoint, name) for name in names)
    for name, first, rows in checkpoint.tensors({name: slots[slot].unit for name, slot in names.items()}):
        slots[names[name]].fill(rows, first)
        done += rows.nbytes
        progress(f"reading {checkpoint.name}", done, total)


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    header = checkpoint.headers[name]
    return prod(header.shape) * (1 if header.dtype == BYTES else parse_dtype(header.dtype).itemsize)


def _shorten(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
