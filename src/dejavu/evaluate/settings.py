"""Settings to evaluate, as text: "dense", "exact", "pack=P,quality=1%", "policy=oracle,mlp=0.1,heads=0.5", with weights=int8
or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

from dejavu.config import Mode, SelectionConfig
from dejavu.engine.engine import Engine
from dejavu.errors import ConfigError

KEYS = ("mode", "pack", "quality", "policy", "mlp", "heads", "kv", "weights")


@dataclass(frozen=True)
class Setting:
    """One way to run a model.

    Args:
        name: in reports.
        mode, selection: what is read; mode "sparse" has a selection, and no other mode.
        weights: a format to quantise to (Engine.load), or None: as stored.
    """

    name: str
    mode: Mode = "dense"
    selection: SelectionConfig | None = None
    weights: str | None = None

    def __post_init__(self):
        if (self.mode == "sparse") != (self.selection is not None):
            raise ConfigError(f"{self.name}: mode sparse needs a pack or a policy, and no other mode takes one")

    def to_dict(self) -> dict:
        return asdict(self)


DENSE = Setting("dense")


def parse_setting(text: str) -> Setting:
    """A setting from text: a mode, or KEY=VALUE parts with commas between them. Raises: ConfigError naming the part."""
    parts: dict[str, str] = {}
    for part in text.split(","):
        key, found, value = part.strip().partition("=")
        if not found and key in get_args(Mode):
            key, value = "mode", key
        if key not in KEYS or not value:
            raise ConfigError(
                f"setting {text!r}: {part!r} is neither a mode ({', '.join(get_args(Mode))}) nor KEY=VALUE with a key of "
                f"{', '.join(KEYS)}"
            )
        if key in parts:
            raise ConfigError(f"setting {text!r}: {key} is given twice")
        parts[key] = value
    if "pack" in parts and "policy" in parts:
        raise ConfigError(f"setting {text!r}: give either a pack or a policy")
    selection = None
    if "pack" in parts:
        quality = parts.get("quality")
        selection = SelectionConfig(
            "predictor", pack=parts["pack"], quality=None if quality is None else share(quality), kv=parts.get("kv", "lazy")
        )
    elif "policy" in parts:
        densities = {key: share(parts.get(key, "1")) for key in ("mlp", "heads")}
        selection = SelectionConfig(parts["policy"], densities["mlp"], densities["heads"], kv=parts.get("kv", "full"))
    for key, owner in (("quality", "pack"), ("mlp", "policy"), ("heads", "policy")):
        if key in parts and owner not in parts:
            raise ConfigError(f"setting {text!r}: {key} goes with a {owner}")
    mode = parts.get("mode", "dense" if selection is None else "sparse")
    return Setting(text, mode, selection, parts.get("weights"))


def share(text: str) -> float:
    """A share written as 1% or 0.01. Raises: ConfigError."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise ConfigError(f"expected a share like 1% or 0.01, found {text!r}") from error


def make_engines(settings: Sequence[Setting], load: Callable[[str | None], Engine], calibration: str | None = None):
    """An engine for each setting, by name; those of one weight format share the weights.

    Args:
        load: a dense engine with weights in a format.
        calibration: a text for the static policy.
    Raises: ConfigError for settings that have one name, or that the model cannot run.
    """
    names = [s.name for s in settings]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"setting {name!r} is given twice")
    loaded = {weights: load(weights) for weights in dict.fromkeys(s.weights for s in settings)}
    return {
        s.name: loaded[s.weights].with_mode(
            s.mode, s.selection, calibration if s.selection and s.selection.policy == "static" else None
        )
        for s in settings
    }
