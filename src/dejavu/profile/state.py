"""What a profile has done so far, in one file that is replaced whole."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dejavu.artifacts import atomic_write
from dejavu.errors import ConfigError
from dejavu.profile.observer import Statistics

STATE_FILE = "state.npz"
SCHEMA_VERSION = 1


@dataclass
class State:
    """Progress of a profile.

    Args:
        identity: what must be the same for a run to go on: model, checkpoint hash, dtype, settings.
        windows: watched so far.
        digest: SHA-256, in hex, of the token ids of the text up to there, the held part included.
        perplexity: of the points measured so far, by name.
        seconds: spent so far.
    """

    identity: dict
    statistics: Statistics
    windows: int = 0
    digest: str = ""
    perplexity: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Raises: ConfigError where the file cannot be written; the one before it is then still whole."""
        header = {"schema_version": SCHEMA_VERSION, **{name: getattr(self, name) for name in _HEADER}}
        arrays = {
            f"{part}.{name}": array
            for part, accumulator in self.statistics.parts().items()
            for name, array in accumulator.arrays().items()
        }
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with atomic_write(folder / STATE_FILE, "wb") as file:
            np.savez(file, header=text, **arrays)

    def resume(self, folder: Path) -> bool:
        """Go on from the folder's file if there is one; says whether.

        Raises: ConfigError where it was made with something else, naming what, or is damaged.
        """
        path = folder / STATE_FILE
        if not path.exists():
            return False
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                version, found = header["schema_version"], header["identity"]
                if version != SCHEMA_VERSION:
                    raise ConfigError(
                        f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; use --overwrite"
                    )
                if other := [name for name in self.identity if found.get(name) != self.identity[name]]:
                    name = other[0]
                    raise ConfigError(
                        f"{folder}: holds a profile with another {name} ({found.get(name)}, not "
                        f"{self.identity[name]}); choose another folder, or --overwrite"
                    )
                for part, accumulator in self.statistics.parts().items():
                    accumulator.load({name: file[f"{part}.{name}"] for name in accumulator.arrays()})
                for name in _HEADER:
                    setattr(self, name, header[name])
        except (OSError, EOFError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: damaged ({error}); start anew with --overwrite") from error
        return True


_HEADER = ("identity", "windows", "digest", "perplexity", "seconds")
