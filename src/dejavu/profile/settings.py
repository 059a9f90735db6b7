"""What a profile measures, and on how much text."""

from __future__ import annotations

from dataclasses import dataclass

from dejavu.config import ModelConfig
from dejavu.errors import ConfigError

SENTENCE = (
    "When the old mill by the river was sold in 1874, the people of the town feared that the old wheel would stop."
)


@dataclass(frozen=True)
class ProfileConfig:
    """Settings of a profile. All of them must be the same for a resumed run.

    Args:
        tokens: of text to watch, at most; cut into windows.
        window: tokens of one forward pass.
        run: tokens in a row, at a random place of each window, for what is too costly to measure on all.
        errors: relative errors of a block's output for which the fewest units are counted. The first one also says
            which units are a token's set where overlap and union are shown.
        quality_tokens: from the start of the text, kept apart for perplexity; 0: no perplexity.
        densities: at which perplexity is measured, for neurons and for heads.
        sentence: whose attention is drawn.
        seed: of the random policy and of the places of runs.
    Raises: ConfigError naming the setting.
    """

    tokens: int = 32_768
    window: int = 512
    run: int = 64
    errors: tuple[float, ...] = (0.1, 0.05, 0.2)
    quality_tokens: int = 2048
    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    sentence: str = SENTENCE
    seed: int = 0

    def __post_init__(self):
        for name, low in (("window", 8), ("tokens", self.window), ("run", 2), ("quality_tokens", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                what = "one window" if name == "tokens" else low
                raise ConfigError(f"{name} must be an integer of at least {what}, found {value!r}")
        if 0 < self.quality_tokens < self.window:
            raise ConfigError(
                f"quality_tokens must be 0 or at least one window ({self.window}), found {self.quality_tokens}"
            )
        for name, good in (("errors", lambda x: 0 < x < 1), ("densities", lambda x: 0 < x <= 1)):
            values = getattr(self, name)
            if not values or not all(isinstance(v, (int, float)) and good(v) for v in values):
                raise ConfigError(f"{name} must be numbers between 0 and 1, at least one, found {values!r}")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} must differ from each other, found {values!r}")
        if not self.sentence.strip():
            raise ConfigError("sentence is empty; give a few words")

    def check(self, model: ModelConfig) -> None:
        """Raises: ConfigError where a window does not fit into the model's context or into one forward pass."""
        from dejavu.model.decoder import PREFILL_CHUNK  # imports PyTorch, which the command line's --help does not need

        limit = min(model.context, PREFILL_CHUNK)
        if self.window > limit:
            raise ConfigError(f"window must be at most {limit} tokens for this model, found {self.window}")
