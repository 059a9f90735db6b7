"""One JSON line a run, with what is needed to understand it later."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dejavu.artifacts import to_json
from dejavu.device import hardware

PACKAGES = ("dejavu", "torch", "transformers", "triton", "numpy", "ctranslate2", "openvino", "llama-cpp-python")


def append(path: Path, **fields: Any) -> dict[str, Any]:
    """Append a record to a .jsonl file: `fields`, and when, at which commit and on what it was measured.

    Args:
        path: its folder is made if need be.
        fields: plain values: model or shape, dtype, batch, lengths, seed, results.
    Returns: the record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **_commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
        **fields,
    }
    line = to_json(record) + "\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)
    return record


def _versions() -> Mapping[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any]:
    """The commit of the running code, and whether its repository differs; None where it is not in one."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Earlier records, not committed yet, don't change what is measured.
    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
