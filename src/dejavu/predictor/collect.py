"""Pairs to learn from: the input of every block, and what each unit of the block then contributed.

Files of one folder, appended to window by window; `state.json` says how many windows are whole, and whatever lies
beyond is cut off on resuming. For T tokens in all:

- `block{b}.bf16`: (T, C), the normalised input of block number b;
- `heads{l}.f16`: (T, H), the norm of each head's contribution;
- `active{l}.bits`: (T, ceil(I / 8)), which neurons are active, packed as numpy.packbits does;
- `norms{l}.f16`: the norms of the active neurons' contributions, token after token, in the order of the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dejavu.artifacts import read_json, write_json
from dejavu.errors import ConfigError
from dejavu.model.decoder import Decoder
from dejavu.model.hooks import Hooks
from dejavu.progress import Progress, silent
from dejavu.selection.block import HEADS, NEURONS, Block
from dejavu.selection.oracle import OutputNorms

STATE = "state.json"


def needed_bytes(decoder: Decoder, tokens: int, density: float = 0.3) -> int:
    """Disk that `collect` fills, if this share of the neurons is active."""
    c = decoder.config
    row = 2 * 2 * c.hidden_size + 2 * c.num_attention_heads + c.intermediate_size // 8
    return int(tokens * c.num_hidden_layers * (row + 2 * density * c.intermediate_size))


def collect(
    decoder: Decoder,
    texts: Iterator[list[int]],
    count: int,
    folder: Path,
    *,
    label_error: float = 0.0,
    progress: Progress = silent,
) -> None:
    """Run the model densely over `count` windows and write the files above; goes on where it was stopped.

    Args:
        texts: the windows; always the same ones in the same order.
        folder: made if need be.
        label_error: see FitConfig.
    Raises: ConfigError where the text is too short.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / STATE
    done, sizes = 0, {}
    if state.exists():
        saved = read_json(state)
        done, sizes = saved.get("windows"), saved.get("bytes")
        if type(done) is not int or not isinstance(sizes, dict) or {type(n) for n in sizes.values()} - {int}:
            raise damaged(state, "expected windows and bytes", folder.parent)
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found < size:
                raise damaged(folder / name, f"expected {size} bytes, found {found}", folder.parent)
            with open(folder / name, "ab") as file:
                file.truncate(size)
    if done >= count:
        return
    recorder = _Recorder(decoder, folder, label_error)
    for path in recorder.paths():
        if path.name not in sizes:
            path.write_bytes(b"")
    for number, ids in enumerate(texts):
        if number >= count:
            break
        if number >= done:
            decoder.prefill(torch.tensor(ids), decoder.new_cache(1, len(ids)), hooks=recorder)
            recorder.flush()
            write_json(state, {"windows": number + 1, "bytes": {p.name: p.stat().st_size for p in recorder.paths()}})
        progress("collect", number + 1, count)
    else:
        if read_json(state)["windows"] < count if state.exists() else True:
            raise ConfigError(f"the text is too short: expected {count} windows, found fewer; give more text")


class _Recorder(Hooks):
    def __init__(self, decoder: Decoder, folder: Path, label_error: float):
        self._folder, self._error = folder, label_error
        self._layers = decoder.config.num_hidden_layers
        self._norms = [OutputNorms(layer) for layer in decoder.weights.layers]
        self._parts: dict[Path, bytes] = {}

    def paths(self) -> list[Path]:
        blocks = [self._folder / _inputs(block) for block in Block.all(self._layers)]
        kinds = ("heads{}.f16", "active{}.bits", "norms{}.f16")
        return blocks + [self._folder / kind.format(i) for kind in kinds for i in range(self._layers)]

    def heads(self, layer: int, y: Tensor, o: Tensor) -> Tensor:
        self._keep(_inputs(Block(layer, HEADS)), _bf16_bytes(y))
        self._keep(f"heads{layer}.f16", self._norms[layer].heads(o).half().cpu().numpy().tobytes())
        return o

    def neurons(self, layer: int, y: Tensor, h: Tensor) -> Tensor:
        norms = self._norms[layer].neurons(h)
        active = norms > 0 if self._error == 0 else most_of_the_norm(norms, self._error)
        self._keep(_inputs(Block(layer, NEURONS)), _bf16_bytes(y))
        self._keep(f"active{layer}.bits", np.packbits(active.cpu().numpy(), axis=1).tobytes())
        # Rounding up to the smallest half keeps an active neuron's weight above zero.
        self._keep(f"norms{layer}.f16", norms[active].clamp(6e-8, 6e4).half().cpu().numpy().tobytes())
        return h

    def _keep(self, name: str, data: bytes) -> None:
        path = self._folder / name
        self._parts[path] = self._parts.get(path, b"") + data

    def flush(self) -> None:
        for path, data in self._parts.items():
            with open(path, "ab") as file:
                file.write(data)
        self._parts.clear()


def most_of_the_norm(norms: Tensor, error: float) -> Tensor:
    """(T, N) bool: of each token the fewest units such that the others' squared norms are at most error^2 of all."""
    values, order = norms.sort(dim=1)
    lost = values.double().pow(2).cumsum(1)
    keep = lost > error**2 * lost[:, -1:]
    return torch.zeros_like(keep).scatter_(1, order, keep)


class Collected:
    """What `collect` wrote, mapped: nothing is read before it is asked for."""

    def __init__(self, folder: Path, hidden_size: int, heads: int, neurons: int):
        self._folder, self._neurons = folder, neurons
        self._sizes = {"block": hidden_size, "heads": heads}
        self.tokens = (folder / _inputs(Block(0, HEADS))).stat().st_size // (2 * hidden_size)

    def inputs(self, block: Block, rows: slice) -> Tensor:
        """(rows, C) float32: the normalised inputs of a block."""
        mapped = np.memmap(self._folder / _inputs(block), np.int16, "r").reshape(self.tokens, -1)
        return torch.from_numpy(mapped[rows].copy()).view(torch.bfloat16).float()

    def heads(self, layer: int, rows: slice) -> Tensor:
        """(rows, H) float32: the norms of the heads' contributions."""
        mapped = np.memmap(self._folder / f"heads{layer}.f16", np.float16, "r").reshape(self.tokens, -1)
        return torch.from_numpy(mapped[rows].astype(np.float32))

    def neurons(self, layer: int) -> Callable[[slice], Tensor]:
        """A function from rows to (rows, I) float32: norms of the active neurons' contributions, else 0."""
        bits = np.memmap(self._folder / f"active{layer}.bits", np.uint8, "r").reshape(self.tokens, -1)
        norms = np.memmap(self._folder / f"norms{layer}.f16", np.float16, "r")
        ends = np.concatenate(([0], np.cumsum(np.bitwise_count(bits).sum(1, dtype=np.int64))))

        def read(rows: slice) -> Tensor:
            active = np.unpackbits(bits[rows], axis=1, count=self._neurons).astype(bool)
            out = np.zeros(active.shape, np.float32)
            out[active] = norms[ends[rows.start] : ends[rows.stop]]
            return torch.from_numpy(out)

        return read


def damaged(path: Path, reason: object, work: Path) -> ConfigError:
    """work: the folder of the whole fit."""
    return ConfigError(f"{path}: is damaged ({reason}); remove {work} to begin anew")


def _inputs(block: Block) -> str:
    return f"block{block.number}.bf16"


def _bf16_bytes(x: Tensor) -> bytes:
    return x.bfloat16().cpu().view(torch.int16).numpy().tobytes()
