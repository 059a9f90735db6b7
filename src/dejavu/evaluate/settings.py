"""Settings to evaluate, as text: "dense", "exact,weights=int8", "pack=P,quality=1%", "policy=oracle,mlp=0.1"."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

from dejavu import config
from dejavu.config import Mode, SelectionConfig, pack_selection, parse_share
from dejavu.engine.engine import Engine
from dejavu.errors import ConfigError
from dejavu.selection.pack import load_pack

KEYS = ("mode", "pack", "quality", "policy", "mlp", "heads", "kv", "weights")


@dataclass(frozen=True)
class Setting(config.Setting):
    """One way to run a model, with a name for reports; None: its mode."""

    name: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.mode)
        try:
            super().__post_init__()
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None


def parse_setting(text: str) -> Setting:
    """A setting from text: a mode, or KEY=VALUE parts with commas between them. Raises: ConfigError naming the part."""
    parts: dict[str, str] = {}
    for part in text.split(","):
        key, found, value = part.strip().partition("=")
        if not found and key in get_args(Mode):
            key, value = "mode", key
        if key not in KEYS or not value:
            raise ConfigError(
                f"setting {text!r}: {part!r} is neither a mode ({', '.join(get_args(Mode))}) nor KEY=VALUE with one of "
                f"the keys {', '.join(KEYS)}"
            )
        if key in parts:
            raise ConfigError(f"setting {text!r}: {key} is given twice")
        parts[key] = value
    if "pack" in parts and "policy" in parts:
        raise ConfigError(f"setting {text!r}: give either a pack or a policy")
    selection = None
    if "pack" in parts:
        selection = pack_selection(parts["pack"], parse_share(parts.get("quality")))
    elif "policy" in parts:
        densities = {key: parse_share(parts.get(key, "1")) for key in ("mlp", "heads")}
        selection = SelectionConfig(parts["policy"], densities["mlp"], densities["heads"])
    if "kv" in parts:
        if selection is None:
            raise ConfigError(f"setting {text!r}: kv goes with a pack or a policy")
        selection = replace(selection, kv=parts["kv"])
    for key, owner in (("quality", "pack"), ("mlp", "policy"), ("heads", "policy")):
        if key in parts and owner not in parts:
            raise ConfigError(f"setting {text!r}: {key} goes with a {owner}")
    mode = parts.get("mode", "dense" if selection is None else "sparse")
    return Setting(mode, selection, parts.get("weights"), text)


def make_engines(
    settings: Sequence[Setting], load: Callable[[str | None], Engine], calibration: str | None = None
) -> dict[str, Engine]:
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


def identify(model: str, engine: Engine, settings: Sequence[Setting]) -> dict:
    """What the scores of settings depend on, as JSON: the checkpoint by its hash, and packs by their cuts."""
    assert engine.checkpoint is not None, "an engine that was loaded"
    packs = dict.fromkeys(
        s.selection.pack for s in settings if s.selection is not None and s.selection.pack is not None
    )
    cuts = {pack: repr([point.cuts for point in load_pack(pack).points]) for pack in packs}
    return {
        "model": model,
        "checkpoint_hash": engine.checkpoint.hash,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "definitions": {s.name: asdict(s) for s in settings},
        "packs": {pack: hashlib.sha256(text.encode()).hexdigest()[:16] for pack, text in cuts.items()},
    }
