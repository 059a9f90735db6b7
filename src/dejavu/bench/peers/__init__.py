"""Others that decode the same model, each driven token by token in its own best configuration.

A peer is asked for by name and by the format of its weights. What it needs beside this package comes with the extra
`peers`; one that is not installed says so. Peers other than Hugging Face read a folder of their own format, which is
written once from Hugging Face's model and reused for as long as the folder lives.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dejavu.bench.names import check_name
from dejavu.device import parse_dtype
from dejavu.errors import ConfigError, DejavuError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dejavu.bench.decode import Decoding


@dataclass(frozen=True)
class Source:
    """The model that peers decode: a checkpoint, or random weights in a shape.

    Args:
        config: its config.json.
        folder: of the checkpoint; None: random weights.
        seed: of random weights.
    """

    config: dict[str, Any]
    folder: Path | None = None
    seed: int = 0

    def hugging_face(self, dtype: str) -> PreTrainedModel:
        """Hugging Face's model, in "fp32" or "bf16"."""
        from dejavu.bench.peers.hugging_face import load_hugging_face, random_hugging_face

        if self.folder is None:
            return random_hugging_face(self.config, parse_dtype(dtype), self.seed)
        return load_hugging_face(self.folder, parse_dtype(dtype))


@dataclass(frozen=True)
class Peer:
    """One way to decode with other software.

    Args:
        name: as the user types it.
        label: as tables show it.
        module: by its full name; it has `formats()` and, but for Hugging Face, `convert` and `load`.
        packages: import names that it needs, of the extra `peers`.
    """

    name: str
    label: str
    module: str
    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot run here; None where it can."""
        absent = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(absent)} not installed; pip install 'dejavu[peers]'" if absent else None

    def formats(self) -> tuple[str, ...]:
        """The weight formats that it offers on this machine. Raises: ConfigError where it is not installed."""
        if reason := self.missing():
            raise ConfigError(f"peer {self.name}: {reason}")
        return self._module.formats()

    def check(self, weights: str, config: dict[str, Any]) -> None:
        """Raises: ConfigError where it is not installed, or has no such weights or no such model."""
        if weights not in self.formats():
            raise ConfigError(f"peer {self.name} offers weights {', '.join(self.formats())} here, found {weights!r}")
        family = config.get("model_type")
        if self.packages and family != "opt":
            raise ConfigError(f"peer {self.name} is set up for OPT models only, found model_type {family!r}")

    def build(self, source: Source, weights: str, *, capacity: int, threads: int, work: str | PathLike) -> Decoding:
        """The peer, ready to decode.

        Args:
            capacity: tokens of prompt and text together, at most.
            work: a folder for converted models; one that it holds already is used as it is.
        Raises: ConfigError as `check` does; DejavuError where the peer's own software fails, with its message.
        """
        self.check(weights, source.config)
        if not self.packages:
            return self._module.build(source, weights, self.name, capacity)
        folder = Path(work) / f"{self.name}-{weights}"
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self._told(partial(self._module.convert, source, weights, part))
            gc.collect()
            part.rename(folder)  # a folder that is there is whole
        return self._told(partial(self._module.load, folder, weights, capacity=capacity, threads=threads))

    @property
    def _module(self) -> ModuleType:
        return import_module(self.module)

    def _told(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            raise DejavuError(f"peer {self.name} failed: {error}") from error


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("hf-eager", "HF eager", f"{__name__}.hugging_face"),
        Peer("hf-compiled", "HF compiled", f"{__name__}.hugging_face"),
        Peer("ctranslate2", "CTranslate2", f"{__name__}.ctranslate2", ("ctranslate2",)),
        Peer("openvino", "OpenVINO", f"{__name__}.openvino", ("openvino",)),
        Peer("llama-cpp", "llama.cpp (GPT-2 stand-in)", f"{__name__}.llama_cpp", ("llama_cpp", "gguf")),
    )
}


def peer(name: str) -> Peer:
    """A peer by name. Raises: ConfigError naming those that exist."""
    return PEERS[check_name("peer", name, PEERS)]


def installed() -> list[str]:
    """Names of the peers that can run here."""
    return [name for name, peer in PEERS.items() if peer.missing() is None]
