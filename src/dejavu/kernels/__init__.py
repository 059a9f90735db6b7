"""The only door to the kernels: picks the backend. What one is, says base.py; what an op means, reference.py."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from dejavu.errors import ConfigError, KernelUnavailable

if TYPE_CHECKING:
    from dejavu.kernels.base import Backend

# By name, where each lies; imported at use.
BACKENDS = {
    "cpu": "dejavu.kernels.cpu.backend",
    "triton": "dejavu.kernels.triton.backend",
    "reference": "dejavu.kernels.base",
}


def backend(name: str = "auto") -> Backend:
    """A backend, the same one at every call.

    Args:
        name: one of BACKENDS, or "auto": triton where there is an NVIDIA GPU, else cpu.
    Raises: ConfigError for an unknown name; KernelUnavailable where an explicit choice cannot run here.
    """
    if name == "auto":
        import torch

        name = "triton" if torch.cuda.is_available() else "cpu"
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} does not exist; choose one of: auto, {', '.join(BACKENDS)}")
    if name == "triton":
        _require_gpu()
    return _load(BACKENDS[name])


@cache
def _load(module: str) -> Backend:
    return import_module(module).BACKEND()


def _require_gpu() -> None:
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise KernelUnavailable("backend 'triton' needs an NVIDIA GPU, and PyTorch finds none; choose backend 'cpu'")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise KernelUnavailable(
            f"backend 'triton' needs a GPU of compute capability 8.0 or higher, found {capability[0]}.{capability[1]}"
        )
