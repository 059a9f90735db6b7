"""What may be given as a prompt: text, token ids, or several of either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from dejavu.errors import ConfigError

Prompt = str | Sequence[int] | np.ndarray | torch.Tensor

_EXPECTED = "expected a prompt, text or token ids, or a list of prompts"


def split_prompts(given: Any) -> tuple[list[str | list[int]], bool]:
    """The prompts of a call, and whether it gave a single one outside of a list.

    Args:
        given: text; token ids in a sequence, or in an array or tensor of one dimension; or several of these in a list,
            or as the rows of two dimensions. Ids are taken as they are; their range is for the model to check.
    Raises: ConfigError naming what was found in their place, or where there is no prompt at all.
    """
    given = _plain(given)
    if isinstance(given, str):
        return [given], True
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"{_EXPECTED}; found {_name(given)}")
    if not given:
        raise ConfigError("the list of prompts is empty; give at least one")
    if _is_number(given[0]):
        return [_ids(given)], True
    return [_one(_plain(prompt), at) for at, prompt in enumerate(given)], False


def _one(prompt: Any, at: int) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, (list, tuple)):
        raise ConfigError(f"{_EXPECTED}; prompt {at} of the list is {_name(prompt)}")
    return _ids(prompt)


def _ids(values: Iterable[Any]) -> list[int]:
    ids = []
    for value in values:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigError(f"token ids must be integers, found {_name(value)}")
        ids.append(int(value))
    return ids


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, complex, np.number, np.bool_))


def _plain(value: Any) -> Any:
    """Arrays, tensors and other sequences as lists; what cannot be one (a generator, a set, bytes) as it is."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return list(value)
    return value


def _name(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} ({type(value).__name__})"
