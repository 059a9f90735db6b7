"""The only door to the kernels. A backend is a module with the ops of reference.py, and:

- `empty(shape, dtype) -> Tensor`: uninitialised memory fit for weights and caches;
- `capture()`: a context manager whose `.graph` holds the ops called inside it. `graph.replay()` runs them
  again on the same tensors in one native call (CPU) or as one CUDA graph. Everything that changes
  from step to step (token ids, positions, counts) therefore lives in tensors.

A GPU's backend also has `beside(work, *inputs)`, which runs work on a second stream; `beside` below serves all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from dejavu.errors import ConfigError, KernelUnavailable

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("cpu", "triton", "reference")


def backend(name: str = "auto", device: str = "cpu") -> ModuleType:
    """Load a backend.

    Args:
        name: one of BACKENDS, or "auto": the fastest for the device.
        device: "cpu" or "cuda".
    Raises: ConfigError for an unknown name; KernelUnavailable where an explicit choice cannot run here.
    """
    if name == "auto":
        name = "triton" if device.startswith("cuda") else "cpu"
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} does not exist; choose one of: auto, {', '.join(BACKENDS)}")
    if name == "triton":
        _require_gpu()
    return import_module(f"dejavu.kernels.{name}")


def beside(ops: ModuleType, work: Callable[[], Sequence[Tensor]], *inputs: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Start work that is not needed yet; the function returned waits for it, and is called once, where it is needed.

    On a GPU the work runs beside what the caller does next (kernels.triton.graph.beside). Other backends do it at once.
    """
    if hasattr(ops, "beside"):
        return ops.beside(work, *inputs)
    result = work()
    return lambda: result


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
