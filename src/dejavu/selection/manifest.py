"""What a pack's JSON may hold: every value is checked, and an error names its place."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from dejavu.errors import PackError

# Scores are log-odds or logarithms: a threshold beyond this selects nothing, or everything.
MOST_THRESHOLD = 1e6
MEASURED = ("ppl_increase", "kl", "mlp_density", "attn_density", "bytes")


class Field:
    """A value of a JSON file with its place. Every method raises PackError, naming both, for another kind of value."""

    def __init__(self, value: Any, file: Path, place: str = ""):
        self.value, self._file, self._place = value, file, place

    def fail(self, expected: str) -> NoReturn:
        found = repr(self.value)
        found = found if len(found) <= 60 else found[:57] + "..."
        raise PackError(f"{self._file}: {self._place or 'it'} must be {expected}, found {found}; get or fit it anew")

    def items(self) -> dict[str, Field]:
        if not isinstance(self.value, dict):
            self.fail("an object")
        return {k: Field(v, self._file, f"{self._place}.{k}".lstrip(".")) for k, v in self.value.items()}

    def __getitem__(self, key: str) -> Field:
        self.items()
        if key not in self.value:
            raise PackError(f"{self._file}: {self._place} lacks {key}; get or fit it anew".replace(":  ", ": it "))
        return self.items()[key]

    def only(self, *keys: str) -> Field:
        for key in keys:
            _ = self[key]
        if unknown := self.value.keys() - set(keys):
            found = ", ".join(sorted(unknown))[:60]
            raise PackError(
                f"{self._file}: {self._place or 'it'} must hold {', '.join(keys)} only, found {found!r}; fit it anew"
            )
        return self

    def list(self) -> list[Field]:
        if not isinstance(self.value, list):
            self.fail("a list")
        return [Field(v, self._file, f"{self._place}[{i}]") for i, v in enumerate(self.value)]

    def integer(self, low: int, high: int = 2**31 - 1) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            self.fail(f"an integer in [{low}, {high}]")
        return self.value

    def number(self, low: float = -1e300, high: float = 1e300) -> float:
        # Compared first: an integer may be too large for a float. NaN fails every comparison.
        if type(self.value) not in (int, float) or not low <= self.value <= high or not math.isfinite(self.value):
            self.fail(f"a number in [{low:g}, {high:g}]")
        return self.value

    def text(self, pattern: str = r"(?s:.*)", expected: str = "a string") -> str:
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value):
            self.fail(expected)
        return self.value


def measured(field: Field) -> dict[str, float]:
    """The figures of a point."""
    for key in MEASURED:
        _ = field[key]
    shares = ("mlp_density", "attn_density", "mlp_recall", "mlp_precision", "agreement")
    return {
        key: value.number(0, 1 + 1e-6) if key in shares else value.number(0) if key == "bytes" else value.number(-1)
        for key, value in field.items().items()
    }


def digest(manifest: dict[str, Any], tensors: Path) -> str:
    """SHA-256 of a manifest without its `sha256`, and of the tensors' file. Raises: OSError."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    whole = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    with open(tensors, "rb") as file:
        whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
