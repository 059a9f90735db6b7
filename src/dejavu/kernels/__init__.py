"""The only door to the kernels. A backend is a module with the ops of reference.py, and:

- `empty(shape, dtype) -> Tensor`: uninitialised memory fit for weights and caches;
- `capture()`: a context manager whose `.graph` holds the ops called inside it. `graph.replay()` runs them
  again on the same tensors in one native call (CPU) or as one CUDA graph. Everything that changes
  from step to step (token ids, positions, counts) therefore lives in tensors.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from dejavu.errors import ConfigError

BACKENDS = ("cpu", "reference")


def backend(name: str = "auto", device: str = "cpu") -> ModuleType:
    """Load a backend.

    Args:
        name: one of BACKENDS, or "auto": the fastest for the device.
        device: "cpu".
    Raises: ConfigError for an unknown name; KernelUnavailable where an explicit choice cannot run here.
    """
    if name == "auto":
        name = "cpu"
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} does not exist; choose one of: auto, {', '.join(BACKENDS)}")
    return import_module(f"dejavu.kernels.{name}")
