"""Sampling against the straightforward formulas, as transformers writes them."""

import math
import random

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
from dejavu.model.finite import is_finite

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
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e40),
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


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324, 1e-6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 1e-300}, {"min_p": 1.0}])
def test_a_temperature_close_to_zero_is_greedy(temperature, filters):
    scores = logits(scale=1e4)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1, **filters), [], V)
    assert [sampler(scores)[0] for _ in range(3)] == [int(scores.argmax())] * 3


def test_a_wide_nucleus_keeps_the_fewest_tokens_and_of_equal_ones_the_first():
    scores = torch.zeros(V)
    scores[[7, 500]] = 1.0
    weights, ids = candidates(scores, SamplingParams(temperature=1.0, top_p=0.5))
    total = 2 * math.e + (V - 2)
    needed = 2 + math.ceil(0.5 * total - 2 * math.e)
    assert ids.tolist() == sorted([7, 500, *[i for i in range(V) if i not in (7, 500)][: needed - 2]])
    assert float(weights.sum()) == pytest.approx(0.5, abs=1 / total)
    # With top_k the sum is that of the k likeliest.
    kept = candidates(scores, SamplingParams(temperature=1.0, top_p=0.5, top_k=600))[1]
    assert len(kept) == 2 + math.ceil(0.5 * (2 * math.e + 598) - 2 * math.e)


def test_a_draw_that_rounds_to_the_whole_sum_is_the_last_token_with_a_weight(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0, dtype=torch.float64))
    assert draw(torch.tensor([1.0, 2.0, 0.0]), torch.Generator()) == 1


def _any_logits(rng: random.Random, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    x = torch.randn(size, generator=generator) * 10.0 ** rng.uniform(-20, 37)
    if rng.random() < 0.4:  # ties, zeros of both signs
        x[torch.randint(size, (size // 2 + 1,), generator=generator)] = rng.choice([0.0, -0.0, 1.0, float(x[0])])
    if rng.random() < 0.2:
        x[rng.randrange(size)] = rng.choice([math.nan, math.inf, -math.inf])
    return x


def test_any_settings_over_any_logits():
    """10,000 requests: a token that exists, or NotFiniteError; the same seed gives the same token."""
    rng, refused = random.Random(0), 0
    for _ in range(10_000):
        size = rng.choice([1, 2, 7, 300, 700])
        x = _any_logits(rng, size)
        warm = rng.random() < 0.8
        params = SamplingParams(
            temperature=10.0 ** rng.uniform(-320, 300) if warm else 0.0,
            top_k=rng.choice([None, 1, 5, 290, 2**31 - 1]) if warm else None,
            top_p=rng.choice([1.0, 0.9, 1e-9, 1e-300, 1 - 1e-16]) if warm else 1.0,
            min_p=rng.choice([0.0, 0.1, 1.0, 1e-300]) if warm else 0.0,
            repetition_penalty=rng.choice([1.0, 0.01, 1.3, 100.0]),
            seed=rng.randrange(2**63),
            logprobs=rng.choice([None, 0, 3]),
        )
        said = [rng.randrange(size) for _ in range(3)]
        if not is_finite(x):
            assert not bool(torch.isfinite(x).all())
            refused += 1
            continue
        assert bool(torch.isfinite(x).all())
        (token, logprob), again = Sampler(params, said, size)(x), Sampler(params, said, size)(x)
        assert type(token) is int and 0 <= token < size and again[0] == token
        if logprob is not None:
            assert math.isfinite(logprob.logprob) and logprob.logprob <= 1e-4
            assert all(0 <= i < size for i, _ in logprob.top)
    assert refused > 1000
