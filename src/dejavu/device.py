"""What this machine is and can do: data types, threads, hardware facts. torch is imported at use."""

from __future__ import annotations

import logging
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dejavu.errors import ConfigError, KernelUnavailable

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time it is given in this process."""
    logging.getLogger("dejavu").warning(message)


def parse_dtype(name: str) -> torch.dtype:
    """The data type called fp32, bf16 or fp16, or by PyTorch's name. Raises: ConfigError for another name."""
    import torch

    full = DTYPES.get(name, name)
    if full not in DTYPES.values():
        raise ConfigError(f"dtype {name!r} is not supported; choose one of: auto, {', '.join(DTYPES)}")
    return getattr(torch, full)


def choose_dtype(name: str, stored: str, device: str) -> torch.dtype:
    """The data type to compute in.

    Args:
        name: what the user asked for; "auto" takes the stored one, except that fp16 becomes bf16 on a CPU,
            which is said once.
        stored: what the checkpoint holds.
        device: "cpu", or a GPU's name.
    Raises: ConfigError for an unknown name; KernelUnavailable for an explicit fp16 on a CPU.
    """
    import torch

    dtype = parse_dtype(stored if name == "auto" else name)
    if dtype != torch.float16 or torch.device(device).type != "cpu":
        return dtype
    if name != "auto":
        raise KernelUnavailable(f"dtype {name} has no CPU kernels; choose bf16 or fp32, or run on a GPU")
    warn_once("The checkpoint is stored in fp16, which has no CPU kernels: it is loaded as bf16.")
    return torch.bfloat16


def default_threads() -> int:
    """How many CPU threads this process may really use: its affinity, capped by its cgroup's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_cgroup_cpus(Path("/sys/fs/cgroup")) or cores)))


def _cgroup_cpus(root: Path) -> float | None:
    """The CPU quota of a container (cgroup v2, then v1), in cores; None where there is none."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return int(quota) / int(period)
    return None


def hardware() -> dict[str, str | int | None]:
    """Facts for benchmark records: `cpu`, `cores` (usable), `memory_bytes`, and `gpu` (None without one)."""
    import torch

    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": default_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
