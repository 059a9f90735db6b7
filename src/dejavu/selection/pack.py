"""The sparsity pack: predictors of one model, and the settings at which they were measured, in one folder.

`pack.json` holds the schema version, which checkpoint it was made for, the lookahead, how it was made, and the
frontier: points from the most faithful to the cheapest, each with a cut for every block and what was measured with it.
`predictors.safetensors` holds for block `b` the tensors `b.down` (R, C), `b.up` (N, R) and `b.bias` (N,); a single
linear layer has no `b.down`. Quantised ones are the bytes of their rows; the manifest's `rows` names format and width.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dejavu.artifacts import read_json, write_json
from dejavu.checkpoint.source import BUNDLED
from dejavu.config import ModelConfig
from dejavu.errors import ConfigError, PackError
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized, RowFormat, Weight
from dejavu.selection.predictor import HEADS, Lookahead, Predictor, PredictorSelector
from dejavu.selection.selector import Cut

SCHEMA = 2
MANIFEST, TENSORS = "pack.json", "predictors.safetensors"


@dataclass(frozen=True)
class Point:
    """One setting of a pack: a cut for each block (None: read all), and what was measured with it.

    `measured` has at least `ppl_increase` (relative, of the mean loss's exponential), `kl` (nats per token),
    `mlp_density`, `attn_density` and `bytes` (read by a step of batch 1, predictors included).
    """

    cuts: tuple[Cut | None, ...]
    measured: Mapping[str, float]


@dataclass
class Pack:
    """Predictors and settings for one checkpoint.

    Args:
        base: `name` and `hash` of the checkpoint.
        predictors: by block (selection.predictor).
        points: the frontier, by bytes, most first.
        default: index of the point within the bound that was asked for.
        made: how: settings, texts, recall and precision.
    """

    base: Mapping[str, str]
    lookahead: Lookahead
    predictors: dict[int, Predictor]
    points: list[Point]
    default: int
    made: Mapping[str, Any] = field(default_factory=dict)

    def point(self, quality: float | None = None) -> Point:
        """The default point, or the cheapest one whose perplexity rose by at most `quality` (0.01: one percent).

        Raises: ConfigError where no point is that good.
        """
        if quality is None:
            return self.points[self.default]
        good = [p for p in self.points if p.measured["ppl_increase"] <= quality]
        if not good:
            best = min(p.measured["ppl_increase"] for p in self.points)
            raise ConfigError(
                f"quality {quality:g}: no point of this pack keeps perplexity within that; the best reaches {best:.4f}"
            )
        return min(good, key=lambda p: p.measured["bytes"])

    def selector(self, config: ModelConfig, ops: Backend, quality: float | None = None) -> PredictorSelector:
        """The selector of one point, over the kernel backend `ops`. Raises: ConfigError as `point` does."""
        cuts = self.point(quality).cuts
        pairs = [(cuts[2 * i], cuts[2 * i + 1]) for i in range(config.num_hidden_layers)]
        return PredictorSelector(self.predictors, self.lookahead, pairs, config, ops)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the pack; the folder appears whole or not at all. Raises: ConfigError where something is there."""
        folder = Path(folder)
        if folder.exists():
            raise ConfigError(f"{folder}: is there already; name another folder, or remove it")
        parts = {
            name: (weight.data if isinstance(weight, Quantized) else weight).contiguous()
            for name, weight in self._weights().items()
        }
        temporary = folder.with_name(f".{folder.name}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(parts, temporary / TENSORS)
            write_json(temporary / MANIFEST, self._manifest())
            os.replace(temporary, folder)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _weights(self) -> dict[str, Weight]:
        return {
            f"{block}.{name}": weight
            for block, p in sorted(self.predictors.items())
            for name, weight in (("down", p.down), ("up", p.up), ("bias", p.bias))
            if weight is not None
        }

    def _manifest(self) -> dict[str, Any]:
        def cut(c: Cut | None) -> dict[str, Any] | None:
            return None if c is None else asdict(c)

        return {
            "schema": SCHEMA,
            "base": dict(self.base),
            "lookahead": asdict(self.lookahead),
            "rows": {
                name: {"format": weight.format.name, "width": weight.width}
                for name, weight in self._weights().items()
                if isinstance(weight, Quantized)
            },
            "default": self.default,
            "points": [{"cuts": [cut(c) for c in p.cuts], "measured": dict(p.measured)} for p in self.points],
            "made": dict(self.made),
        }


def load_pack(source: str | os.PathLike, *, revision: str | None = None, device: str | torch.device = "cpu") -> Pack:
    """Read a pack from a folder, from the Hugging Face Hub by its id, or the bundled one, "opt-mini".

    Raises: PackError for a pack that is missing, damaged or of another schema.
    """
    folder = _find(source, revision)
    data = read_json(folder / MANIFEST, PackError)
    if data.get("schema") != SCHEMA:
        raise PackError(f"{folder / MANIFEST}: expected schema {SCHEMA}, found {data.get('schema')!r}; fit it anew")
    try:
        points = [
            Point(tuple(None if c is None else Cut(**c) for c in p["cuts"]), p["measured"]) for p in data["points"]
        ]
        pack = Pack(data["base"], Lookahead(**data["lookahead"]), {}, points, data["default"], data["made"])
        pack.points[pack.default].measured["bytes"], pack.base["hash"]
        rows = {name: (RowFormat.parse(row["format"]), row["width"]) for name, row in data["rows"].items()}
    except (KeyError, TypeError, IndexError, AttributeError, ConfigError) as error:
        raise PackError(f"{folder / MANIFEST}: is damaged ({type(error).__name__}: {error})") from error
    try:
        with safe_open(folder / TENSORS, "pt", device=str(device)) as file:
            tensors: dict[str, Weight] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, (form, width) in rows.items():
            if tensors[name].shape[-1] != form.row_bytes(width):
                raise PackError(f"{folder / TENSORS}: {name} is not made of rows of {form.name}; fit it anew")
            tensors[name] = Quantized(tensors[name], width, form)
        for block in sorted({int(name.partition(".")[0]) for name in tensors}):
            pack.predictors[block] = Predictor(
                tensors.get(f"{block}.down"), tensors[f"{block}.up"], tensors[f"{block}.bias"]
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise PackError(f"{folder / TENSORS}: is missing or damaged ({error})") from error
    return pack


def check_pack(pack: Pack, source: str | os.PathLike, config: ModelConfig, checkpoint_hash: str) -> None:
    """Raises: PackError where the pack was made for other weights, or its tensors don't fit the model."""
    if pack.base["hash"] != checkpoint_hash:
        raise PackError(
            f"{source}: was made for {pack.base.get('name')} with hash {pack.base['hash'][:12]}, but this checkpoint's "
            f"is {checkpoint_hash[:12]}; fit a pack for these weights"
        )
    blocks = 2 * config.num_hidden_layers
    for point in pack.points:
        wanted = {b for b, cut in enumerate(point.cuts) if cut is not None}
        if len(point.cuts) != blocks or not wanted <= pack.predictors.keys():
            raise PackError(f"{source}: its cuts don't fit a model of {config.num_hidden_layers} layers; fit it anew")
    for block, p in pack.predictors.items():
        units = config.num_attention_heads if block % 2 == HEADS else config.intermediate_size
        inner = p.up.shape[1] if p.down is None else p.down.shape[1]
        chained = p.down is None or p.down.shape[0] == p.up.shape[1]
        if p.up.shape[0] != units or p.bias.shape != (units,) or inner != config.hidden_size or not chained:
            raise PackError(f"{source}: the predictor of block {block} has the wrong shape; fit it anew")


def _find(source: str | os.PathLike, revision: str | None) -> Path:
    if str(source) == BUNDLED:
        return Path(__file__).parents[1] / "assets" / f"{BUNDLED}-pack"
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise PackError(f"{source}: there is no such folder, and it is no id on the hub (owner/name)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        paths = [hf_hub_download(name, part, revision=revision) for part in (MANIFEST, TENSORS)]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise PackError(f"{source}: is no folder here, and cannot be loaded from the hub ({error})") from error
    return Path(paths[0]).parent
