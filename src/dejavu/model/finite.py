"""Numbers that are none: noticed in the logits, where it costs nothing, and then traced to where they begin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dejavu.errors import NotFiniteError
from dejavu.model.hooks import BlockName, Hooks

if TYPE_CHECKING:
    from dejavu.model.decoder import Decoder


def is_finite(logits: Tensor) -> bool:
    """Whether no number is NaN or infinite: both would show in the least or the largest."""
    if logits.device.type == "cpu":  # numpy's take a fifth of the time of torch's for one row
        values = logits.numpy()
        return math.isfinite(values.min()) and math.isfinite(values.max())
    return bool(torch.isfinite(torch.stack(torch.aminmax(logits))).all())


def not_finite(what: str) -> NotFiniteError:
    return NotFiniteError(
        f"{what} gives NaN or infinity; the weights are damaged, or their numbers too large for the data type "
        "(fp32 has room for all)"
    )


def trace(decoder: Decoder, ids: Tensor) -> NotFiniteError | None:
    """Reads tokens (T,) whole, and tells the layer in which NaN or infinity begins; None: in none."""
    try:
        decoder.prefill(ids, decoder.new_cache(1, ids.numel()), hooks=Watch())
    except NotFiniteError as error:
        return error
    return None


class Watch(Hooks):
    """Raises NotFiniteError at the first block whose output is not finite."""

    def begin(self, x: Tensor, positions: Tensor) -> None:
        self._positions = positions
        self._look(x, "the embedding")

    def block(self, layer: int, block: BlockName, x: Tensor, f: Tensor) -> None:
        name = f"layer {layer}: its {'attention' if block == 'attention' else 'MLP'}"
        self._look(f, name)
        self._look(x + f, f"{name}, added to what comes in,")

    def logits(self) -> NotFiniteError:
        """What is left where every layer was finite."""
        return not_finite("the final norm or the LM head")

    def _look(self, values: Tensor, name: str) -> None:
        bad = ~torch.isfinite(values).all(1)
        if bad.any():
            raise not_finite(f"{name} for token {int(self._positions[bad.nonzero()[0]])}")
