"""The sparsity pack: predictors of one model, and the settings at which they were measured, in one folder.

`pack.json` holds the schema version, which checkpoint it was made for, the lookahead, how it was made, and the
frontier: points from the most faithful to the cheapest, each with a cut for every block and what was measured with it.
`predictors.safetensors` holds for block number `b` the tensors `b.down` (R, C), `b.up` (N, R) and `b.bias` (N,); a
single linear layer has no `b.down`. Quantised ones are the bytes of their rows; the manifest's `rows` names format and
width.
`sha256` is of the manifest and the tensors: any changed byte is noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dejavu.artifacts import new_folder, read_json, write_json, write_tensors
from dejavu.checkpoint.saved import hashes
from dejavu.checkpoint.source import BUNDLED, Checkpoint
from dejavu.config import ModelConfig
from dejavu.errors import ConfigError, PackError
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized, RowFormat, Weight
from dejavu.selection.block import Block
from dejavu.selection.manifest import MOST_THRESHOLD, Field, digest, measured
from dejavu.selection.predictor import Lookahead, Predictor, PredictorSelector
from dejavu.selection.selector import Cut

# Schema 2 had no sha256; such packs still load.
SCHEMA, WITHOUT_HASH = 3, 2
MANIFEST, TENSORS = "pack.json", "predictors.safetensors"


@dataclass(frozen=True)
class Point:
    """One setting of a pack: a cut for each block, in order (None: read all), and what was measured with it.

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
        predictors: by block.
        points: the frontier, by bytes, most first.
        default: index of the point within the bound that was asked for.
        made: how: settings, texts, recall and precision.
    """

    base: Mapping[str, str]
    lookahead: Lookahead
    predictors: dict[Block, Predictor]
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
        cuts = Block.pairs(self.point(quality).cuts)
        return PredictorSelector(self.predictors, self.lookahead, cuts, config, ops)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the pack; the folder appears whole or not at all. Raises: ConfigError where something is there."""
        parts = {n: weight.data if isinstance(weight, Quantized) else weight for n, weight in self._weights().items()}
        with new_folder(folder) as made:
            write_tensors(made / TENSORS, parts)
            manifest = self._manifest()
            write_json(made / MANIFEST, manifest | {"sha256": digest(manifest, made / TENSORS)})

    def _weights(self) -> dict[str, Weight]:
        return {
            f"{block.number}.{name}": weight
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
    pack, rows = _parse(Field(data, folder / MANIFEST))
    try:
        if data["schema"] == SCHEMA and digest(data, folder / TENSORS) != data["sha256"]:
            raise PackError(f"{folder}: is damaged, or was edited (its sha256 is another); get or fit it anew")
        with safe_open(folder / TENSORS, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise PackError(f"{folder / TENSORS}: is missing or damaged ({error})") from error
    _attach(pack, tensors, rows, folder / TENSORS)
    return pack


def _parse(data: Field) -> tuple[Pack, dict[str, tuple[RowFormat, int]]]:
    """The pack without its predictors, and the formats of quantised tensors. Raises: PackError naming the field."""
    if data["schema"].integer(0) not in (SCHEMA, WITHOUT_HASH):
        data["schema"].fail(f"{SCHEMA}, or {WITHOUT_HASH} of an older pack")
    data.only(
        "schema",
        "base",
        "lookahead",
        "rows",
        "default",
        "points",
        "made",
        *["sha256"] * (data.value["schema"] == SCHEMA),
    )
    sha = "[0-9a-f]{64}", "64 hexadecimal digits"
    if data.value["schema"] == SCHEMA:
        data["sha256"].text(*sha)
    base = {"name": data["base"].only("name", "hash")["name"].text(), "hash": data["base"]["hash"].text(*sha)}
    ahead = data["lookahead"].only("heads", "neurons")
    points = []
    for point in data["points"].list():
        cuts = point.only("cuts", "measured")["cuts"].list()
        points.append(Point(tuple(map(_cut, cuts)), measured(point["measured"])))
        if len(cuts) % 2 or len(cuts) != len(points[0].cuts):
            point["cuts"].fail("as long as those of the first point, and of two blocks a layer")
    if not points:
        data["points"].fail("at least one point")
    rows = {}
    for name, row in data["rows"].items().items():
        kind = row.only("format", "width")["format"]
        try:
            rows[name] = RowFormat.parse(kind.text()), row["width"].integer(1, 1 << 24)
        except ConfigError:
            kind.fail("a format of rows, such as int4")
    made = data["made"].items()
    if "checked" in made:
        measured(made["checked"])
    lookahead = Lookahead(ahead["heads"].integer(0), ahead["neurons"].integer(0))
    return Pack(base, lookahead, {}, points, data["default"].integer(0, len(points) - 1), data.value["made"]), rows


def _cut(cut: Field) -> Cut | None:
    if cut.value is None:
        return None
    k, threshold = cut.only("k", "threshold")["k"].integer(1), cut["threshold"]
    return Cut(k, None if threshold.value is None else threshold.number(-MOST_THRESHOLD, MOST_THRESHOLD))


def _attach(pack: Pack, tensors: dict[str, Tensor], rows: dict[str, tuple[RowFormat, int]], file: Path) -> None:
    """Make the predictors. Raises: PackError naming the tensor that is missing, or not what a predictor is made of."""

    def bad(name: str, expected: str) -> PackError:
        found = f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"
        return PackError(f"{file}: {name} must be {expected}, found {found}; get or fit the pack anew")

    weights: dict[str, Weight] = {}
    for name in sorted(tensors.keys() | rows.keys()):
        tensor, blocks = tensors.get(name), len(pack.points[0].cuts)
        found = re.fullmatch(r"([0-9]{1,6})\.(down|up|bias)", name)
        if found is None or int(found[1]) >= blocks or str(int(found[1])) != found[1]:
            raise bad(name, f"of a block below {blocks}, and called down, up or bias")
        if found[2] == "bias":
            kind, expected = (torch.float32, 1), "float32 (N,)"
        elif name in rows:
            form, width = rows[name]
            kind, expected = (torch.uint8, 2), f"uint8 rows of {width} values in {form.name}"
        else:
            kind, expected = (torch.bfloat16, 2), "bfloat16 (N, C)"
        if tensor is None or (tensor.dtype, tensor.dim()) != kind or not tensor.numel():
            raise bad(name, expected)
        if name in rows:
            if tensor.shape[1] != form.row_bytes(width):
                raise PackError(f"{file}: {name} is not made of rows of {form.name} of {width} values; fit it anew")
            weights[name] = Quantized(tensor.contiguous(), width, form)
            numbers = [part for part in weights[name].parts()[1:] if part is not None]
        else:
            weights[name], numbers = tensor, [tensor]
        if not all(part.isfinite().all() for part in numbers):
            raise bad(name, "finite")
    for number in sorted({int(name.partition(".")[0]) for name in weights}):
        for part in ("up", "bias"):
            if f"{number}.{part}" not in weights:
                raise bad(f"{number}.{part}", "there")
        p = Predictor(weights.get(f"{number}.down"), weights[f"{number}.up"], weights[f"{number}.bias"])
        if p.bias.shape[0] != p.up.shape[0] or (p.down is not None and p.down.shape[0] != p.up.shape[1]):
            raise bad(f"{number}.up", "as many rows as bias has values, as wide as down has rows")
        pack.predictors[Block.of(number)] = p


def check_pack(pack: Pack, source: str | os.PathLike, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises: PackError where the pack was made for other weights, or its tensors don't fit the model."""
    if pack.base["hash"] not in hashes(checkpoint):
        raise PackError(
            f"{source}: was made for {pack.base.get('name')} with hash {pack.base['hash'][:12]}, but this checkpoint's "
            f"is {checkpoint.hash[:12]}; fit a pack for these weights"
        )
    blocks, units = Block.all(config.num_hidden_layers), (config.num_attention_heads, config.intermediate_size)
    for point in pack.points:
        wanted = {Block.of(n) for n, cut in enumerate(point.cuts) if cut is not None}
        if len(point.cuts) != len(blocks) or not wanted <= pack.predictors.keys():
            raise PackError(f"{source}: its cuts don't fit a model of {config.num_hidden_layers} layers; fit it anew")
        for block, cut in zip(blocks, point.cuts, strict=True):
            if cut is not None and cut.k > (most := units[block.part]):
                raise PackError(f"{source}: block {block.number} keeps up to {cut.k} of {most} units; fit it anew")
    for block, p in pack.predictors.items():
        rows = units[block.part]
        inner = p.up.shape[1] if p.down is None else p.down.shape[1]
        chained = p.down is None or p.down.shape[0] == p.up.shape[1]
        if p.up.shape[0] != rows or p.bias.shape != (rows,) or inner != config.hidden_size or not chained:
            raise PackError(f"{source}: the predictor of block {block.number} has the wrong shape; fit it anew")


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
