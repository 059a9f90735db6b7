"""Sampling against the straightforward formulas, as transformers writes them."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dejavu.config import SamplingParams
from dejavu.engine.sampling import NUCLEUS_GUESS, Sampler, candidates, draw, penalise
from dejavu.errors import ConfigError

V = 1000


def logits(seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale


def distribution(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    probs, ids = candidates(scores, params)
    full = torch.zeros(V)
    full[slice(None) if ids is None else ids] = probs / probs.sum()
    return full


@pytest.mark.parametrize("scale", [0.1, 3.0])  # at 0.1 the nucleus is larger than the first guess
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 300, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filters_match_transformers(settings, scale):
    params = SamplingParams(**{"temperature": 1.0} | settings)
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    scores = logits(scale=scale)
    expected = LogitsProcessorList(warpers)(None, scores[None])[0].softmax(-1)
    actual = distribution(scores, params)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected)


def test_both_sizes_of_the_nucleus_search_are_met():
    params = SamplingParams(temperature=1.0, top_p=0.9)
    assert candidates(logits(scale=3.0), params)[0].numel() < NUCLEUS_GUESS
    assert candidates(logits(scale=0.1), params)[0].numel() > NUCLEUS_GUESS


def test_repetition_penalty_matches_transformers():
    scores, said = logits(), torch.zeros(V, dtype=torch.bool)
    ids = torch.tensor([3, 5, 5, 900])
    said[ids] = True
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids[None], scores[None])[0]
    torch.testing.assert_close(penalise(scores, said, 1.3), expected)


def test_penalty_counts_prompt_and_new_tokens():
    scores = torch.tensor([4.0, 3.0, 2.0])
    sampler = Sampler(SamplingParams(repetition_penalty=10.0), [0], 3)
    assert [sampler(scores)[0] for _ in range(3)] == [1, 2, 0]  # 0.4 3 2; 0.4 0.3 2; 0.4 0.3 0.2


def test_draws_follow_the_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    counts = torch.bincount(torch.tensor([draw(weights, generator) for _ in range(n)]), minlength=6)
    assert counts[weights == 0].sum() == 0
    for count, p in zip(counts.tolist(), (weights / weights.sum()).tolist(), strict=True):
        assert abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))  # four standard deviations


def test_seed_repeats_and_no_seed_varies():
    def run(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], V)
        return [sampler(logits())[0] for _ in range(20)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


def test_greedy_takes_the_largest_and_leaves_the_logits_alone():
    scores = logits()
    before = scores.clone()
    assert Sampler(SamplingParams(), [], V)(scores) == (int(scores.argmax()), None)
    Sampler(SamplingParams(temperature=2.0, repetition_penalty=1.5, top_k=5), [1, 2], V)(scores)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "top_k": 3, "repetition_penalty": 2.0}])
def test_logprobs_are_the_models_own(settings):
    scores = logits()
    token, logprob = Sampler(SamplingParams(logprobs=4, **settings), [0, 1], V)(scores)
    own = scores.log_softmax(-1)
    assert logprob.token_id == token and logprob.logprob == pytest.approx(float(own[token]))
    best = own.topk(4)
    assert [i for i, _ in logprob.top] == best.indices.tolist()
    assert [p for _, p in logprob.top] == pytest.approx(best.values.tolist())
    assert Sampler(SamplingParams(logprobs=0), [], V)(scores)[1].top == ()


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("stop", ("a", "")),
        ("stop", (1,)),
        ("logprobs", -1),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        SamplingParams(**{"temperature": 1.0} | {field: value})


def test_filters_without_temperature_contradict():
    with pytest.raises(ConfigError, match="need a temperature above 0"):
        SamplingParams(top_k=5)


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="end").stop == ("end",)
