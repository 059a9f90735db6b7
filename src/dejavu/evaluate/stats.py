"""Means, standard errors, and paired differences with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log, sqrt
from sys import float_info

import numpy as np

LARGEST = log(float_info.max)  # whose exponential is a number
Z = 1.959964  # of a normal distribution: 95 % lie within so many standard errors


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; infinite for fewer than two."""
    return float(np.std(values, ddof=1) / sqrt(len(values))) if len(values) > 1 else inf


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean difference of values of the same documents, and its 95 % confidence interval."""
    paired = np.asarray(ours, float) - np.asarray(theirs, float)
    mean, error = float(paired.mean()), standard_error(paired)
    return {"difference": mean, "low": mean - Z * error, "high": mean + Z * error}


def perplexity(logprobs: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """exp(-sum of log p / sum of weights), and its standard error.

    Args:
        logprobs: of documents (or windows), taken as independent.
        weights: tokens, words or bytes of each.
    Returns: infinite where that is too large for a number, or nothing was weighed.
    """
    total = sum(weights)
    if not total or -sum(logprobs) / total > LARGEST:
        return inf, inf
    value = exp(-sum(logprobs) / total)
    return value, value * _rate_error(logprobs, weights)


def perplexity_ratio(ours: Sequence[float], theirs: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """The relative difference of two perplexities of the same documents (0.01: one percent more), with its interval.

    A single document has none: its ends are infinite, and all is where nothing was weighed.
    """
    if not sum(weights):
        return {"difference": inf, "low": -inf, "high": inf}
    lost = np.asarray(theirs, float) - np.asarray(ours, float)
    rate, error = lost.sum() / sum(weights), _rate_error(lost, weights)
    with np.errstate(over="ignore"):
        low, high = (float(np.expm1(rate + k * error)) if error < inf else k * inf for k in (-Z, Z))
        return {"difference": float(np.expm1(rate)), "low": low, "high": high}


def _rate_error(values: Sequence[float], weights: Sequence[float]) -> float:
    """Standard error of sum(values) / sum(weights), a ratio of two means."""
    x, w = np.asarray(values, float), np.asarray(weights, float)
    rest = x - w * (x.sum() / w.sum())
    return standard_error(rest) / w.mean() if len(x) > 1 else inf
