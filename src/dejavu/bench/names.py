"""Names that a user types: the one meant, or an error that says which exist."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from dejavu.errors import ConfigError


def check_name(kind: str, name: str, known: Collection[str]) -> str:
    """The name itself. Raises: ConfigError that lists those that exist, and the closest first."""
    if name in known:
        return name
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{kind} {name!r} does not exist; choose one of: {', '.join(known)}{hint}")
