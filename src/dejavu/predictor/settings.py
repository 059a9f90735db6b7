"""What `fit` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from dejavu.errors import ConfigError
from dejavu.kernels.quantized import RowFormat

Bound = Literal["ppl_increase", "kl", "mlp_density"]


MOST_WINDOW = 2048


@dataclass(frozen=True)
class FitConfig:
    """How the predictors of a model are made and judged.

    Args:
        tokens: to learn from; a tenth more are kept aside to choose cuts by.
        window: tokens that are read in one piece; 0: the model's context, MOST_WINDOW at most. Predictors know no
            position that they never saw.
        calibration_tokens: to search cuts on; as many again, never seen before, judge the result.
        bound, limit: what the default setting must keep: the relative rise of perplexity, the Kullback-Leibler
            divergence from the dense model in nats per token, or the mean MLP density.
        heads_ahead, neurons_ahead: see selection.predictor.Lookahead. A block's own input tells most about it, and on a
            CPU nothing overlaps.
        rank: of the neurons' predictors; 0 chooses for each layer the one that reads the fewest bytes.
        weights: how the predictors are stored: bf16, or a format of kernels.quantized.RowFormat by name.
        train: False keeps the best linear map of that rank, which needs no gradient.
        label_error: 0: a neuron is active where its activation is not zero. Above: the fewest neurons of a token that
            leave out at most this share of the norm of the MLP's output (CETT); for activations that are never zero.
        epochs, seed: of training.
    Raises: ConfigError naming the field.
    """

    tokens: int = 49_152
    window: int = 0
    calibration_tokens: int = 12_288
    bound: Bound = "ppl_increase"
    limit: float = 0.01
    heads_ahead: int = 0
    neurons_ahead: int = 0
    rank: int = 0
    weights: str = "int4"
    train: bool = True
    label_error: float = 0.0
    epochs: int = 3
    seed: int = 0

    def __post_init__(self):
        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise ConfigError(f"{name} must be {expected}, found {getattr(self, name)!r}")

        for name, low in (
            ("window", 0),
            ("epochs", 1),
            ("heads_ahead", 0),
            ("neurons_ahead", 0),
            ("rank", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            check(name, type(value) is int and value >= low, f"an integer of at least {low}")
        for name in ("tokens", "calibration_tokens"):
            value = getattr(self, name)
            check(name, type(value) is int and value >= 4 * self.window, f"at least four windows ({4 * self.window})")
        check("bound", self.bound in ("ppl_increase", "kl", "mlp_density"), "ppl_increase, kl or mlp_density")
        check("limit", math.isfinite(self.limit) and self.limit > 0, "a number above 0")
        check("label_error", 0 <= self.label_error < 1, "in [0, 1)")
        check("weights", self.weights != "signs", "a format that keeps sizes: bf16, int8 or int4")
        _ = self.row_format

    def within(self, context: int) -> FitConfig:
        """These settings for a model of this context: its window is known. Raises: ConfigError as the constructor."""
        return self if self.window else replace(self, window=min(context, MOST_WINDOW))

    @property
    def row_format(self) -> RowFormat | None:
        """Of the predictors' rows; None: bf16, not quantised."""
        return None if self.weights == "bf16" else RowFormat.parse(self.weights)
