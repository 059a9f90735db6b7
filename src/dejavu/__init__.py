"""dejavu: contextual sparsity for fast decoding of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dejavu.config import SamplingParams as SamplingParams
    from dejavu.config import SelectionConfig as SelectionConfig
    from dejavu.engine.engine import Engine as Engine
    from dejavu.engine.generation import Chunk as Chunk
    from dejavu.engine.generation import Generation as Generation
    from dejavu.errors import DejavuError as DejavuError

    __version__: str
    load = Engine.load

# Where the public names live. They are imported at use, because PyTorch takes seconds to import.
_PUBLIC = {
    "Chunk": "dejavu.engine.generation",
    "DejavuError": "dejavu.errors",
    "Engine": "dejavu.engine.engine",
    "Generation": "dejavu.engine.generation",
    "SamplingParams": "dejavu.config",
    "SelectionConfig": "dejavu.config",
}

__all__ = [*_PUBLIC, "__version__", "load"]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("dejavu")
    if name == "load":
        return __getattr__("Engine").load
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dejavu' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
