"""What this machine is and can do: data types, threads, memory, hardware facts. torch is imported at use."""

from __future__ import annotations

import logging
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dejavu.errors import CapacityError, ConfigError, KernelUnavailable

if TYPE_CHECKING:
    import torch

# More threads than cores only wait for each other; a few times as many are an experiment, more are a slip of the hand.
THREADS_PER_CORE = 8
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


def check_threads(n: int) -> None:
    """Raises: ConfigError for a number of threads below 1, or so large that it can only be a mistake."""
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if type(n) is not int or not 1 <= n <= most:
        raise ConfigError(
            f"threads must be an integer from 1 to {most} ({THREADS_PER_CORE} for each core there is), found {n!r}"
        )


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers (AVX-512 BF16, AMX): with them PyTorch multiplies
    matrices many times faster than in float32; without them, many times slower."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.cpu.get_capabilities().get("avx512_bf16", False)


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


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that may be taken before the system, or the container's limit, takes the process down.

    On a CPU what the kernel counts as available, within every cgroup limit that holds for this process (its own page
    cache counts as free, since it is given back); on a GPU what is free there or held unused by PyTorch.
    """
    import torch

    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        free = _number_after(Path("/proc/meminfo").read_text(), "MemAvailable:") << 10
    except (OSError, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def require_memory(needed: float, device: str | torch.device, what: str, instead: str) -> None:
    """Raises: CapacityError where `what` needs more bytes than are free; `instead`: what to do about it."""
    free = free_memory(device)
    if needed > free:
        raise CapacityError(f"{what} would take {_gigabytes(needed)}, and {_gigabytes(free)} are free; {instead}")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _number_after(text: str, name: str) -> int:
    return int(text.partition(name)[2].split()[0])


def _cgroup_memory(root: Path, own: Path) -> list[int]:
    """What is left of each memory limit (cgroup v2, then v1) on this process's cgroup and on those around it."""
    try:
        # v2: "0::/a/b"; v1: "4:memory:/a/b". In a container the path may be the host's: then only the root is there.
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
        path = next(path for _, kinds, path in lines if kinds == "" or "memory" in kinds.split(","))
    except (OSError, ValueError, StopIteration):
        path = "/"
    left = []
    for base, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        leaf = base / path.lstrip("/")
        for folder in (leaf, *leaf.parents):
            try:
                cached = _number_after("\n" + (folder / "memory.stat").read_text(), "\ninactive_file")
                left.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + cached)
            except (OSError, ValueError, IndexError):  # none there, or no limit, which v2 writes as "max"
                continue
    return left


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
