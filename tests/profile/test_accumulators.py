"""Every statistic against its definition, computed the slow way."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dejavu.profile import activity, attention
from dejavu.profile.activity import Activity
from dejavu.profile.oracle import OracleDensity, fewest
from dejavu.profile.states import Norms, Similarity
from dejavu.profile.windows import windows


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_fewest_units_by_trying_every_number():
    terms = torch.randn(9, 13, 5).double() * torch.rand(9, 13, 1) ** 4
    terms[:, 3] = 0
    scores, total = terms.norm(dim=2), terms.sum(1)
    asked = []

    def error(mask):
        asked.append(mask)
        return (total - (terms * mask[:, :, None]).sum(1)).norm(dim=1) / total.norm(dim=1)

    found = fewest(scores, error, (0.3, 0.05))
    assert len(asked) <= 2 * math.ceil(math.log2(14))
    order = scores.argsort(1, descending=True)
    for bound, token in itertools.product((0.3, 0.05), range(9)):
        errors = [
            (total[token] - terms[token, order[token, :k]].sum(0)).norm() / total[token].norm() for k in range(14)
        ]
        k = int(found[bound][token].sum())
        assert errors[k] <= bound and (k == 0 or errors[k - 1] > bound)
        assert set(found[bound][token].nonzero().flatten().tolist()) == set(order[token, :k].tolist())
        assert k <= 12  # the unit of score 0 is never needed


def test_oracle_density():
    density, masks = OracleDensity(2, 3), [torch.rand(2, 7, 10) < 0.4 for _ in range(3)]
    for layer, mask in enumerate(masks):
        density.add(layer, list(mask[:, :4]))
        density.add(layer, list(mask[:, 4:]))
    expected = torch.stack([mask.double().mean((1, 2)) for mask in masks], 1)
    torch.testing.assert_close(density.density(10), expected)


def test_firing_and_overlap():
    seen, chunks = Activity(2, 11), [torch.rand(size, 11) < 0.3 for size in (5, 8)]
    for chunk in chunks:
        seen.add(1, chunk)
        seen.add(0, torch.zeros_like(chunk))
    joined = torch.cat(chunks).double()
    torch.testing.assert_close(seen.density()[1], joined.mean())
    torch.testing.assert_close(seen.frequency()[1], joined.mean(0).sort(descending=True).values)
    pairs = [(c[i - 1], c[i]) for c in chunks for i in range(1, len(c))]
    expected = sum(int((a & b).sum()) for a, b in pairs) / sum(int(b.sum()) for _, b in pairs)
    assert seen.overlap().tolist() == [0, pytest.approx(expected)]


def test_union_is_that_of_random_batches():
    masks = torch.rand(200, 37) < 0.1
    seen = Activity(1, 37)
    seen.add(0, masks)
    got = seen.union((1, 4, 16, 300))
    exact = [1 - (1 - masks.double().mean(0)).pow(size).mean() for size in (1, 4, 16)]  # with replacement
    # 64 random batches of 200 tokens: a few times the standard error of the mean over 37 neurons.
    assert got[:3, 0].tolist() == pytest.approx([float(e) for e in exact], abs=0.03)
    assert got[3].isnan().all()


def test_the_sample_holds_every_token_with_the_same_chance():
    tokens = 8 * activity.SAMPLE
    seen = Activity(2, 16)
    numbers = torch.arange(tokens)
    for chunk in numbers.split(100):
        bits = (chunk[:, None] >> torch.arange(16)) & 1
        for layer in range(2):
            seen.add(layer, bits.bool())
    held = [int(high) for high in torch.tensor([[int(f"{b:08b}"[::-1], 2) for b in row] for row in seen.sample[0]])
            @ torch.tensor([1, 256])]  # fmt: skip
    assert torch.equal(seen.sample[0], seen.sample[1])
    assert len(set(held)) == activity.SAMPLE and max(held) < tokens
    # The mean of 256 numbers drawn evenly: its standard deviation is 0.018 of the range.
    assert sum(held) / len(held) / tokens == pytest.approx(0.5, abs=0.07)


def test_states():
    x = [torch.randn(6, 7) for _ in range(3)]
    f = torch.randn(6, 7)
    similarity, norms = Similarity(3), Norms(3)
    similarity.add([s[:2] for s in x])
    similarity.add([s[2:] for s in x])
    for a, b in itertools.product(range(3), repeat=2):
        expected = F.cosine_similarity(x[a], x[b]).mean().item()
        assert similarity.mean()[a, b].item() == pytest.approx(expected, abs=1e-6)
    norms.add(2, "mlp", x[0][:1], f[:1])
    norms.add(2, "mlp", x[0][1:], f[1:])
    before, added = x[0].norm(dim=1), f.norm(dim=1)
    expected = [before, added, added / before, F.cosine_similarity(x[0], x[0] + f)]
    assert norms.means()[2, 1].tolist() == pytest.approx([e.mean().item() for e in expected], abs=1e-6)


def test_an_accumulator_comes_back_from_its_arrays():
    first, second = Activity(1, 9), Activity(1, 9)
    first.add(0, torch.rand(5, 9) < 0.5)
    second.load({name: array.copy() for name, array in first.arrays().items()})
    assert torch.equal(first.overlap(), second.overlap()) and torch.equal(first.sample, second.sample)
    with pytest.raises(ValueError, match="fired: expected"):
        Activity(1, 10).load(first.arrays())


def test_heavy_and_uniform_heads_by_extremes():
    T = 12
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    sink = torch.zeros(T, T)
    sink[:, 0] = 1
    maps = torch.stack((uniform, sink))[None]
    assert attention.evenness(maps)[0].tolist() == pytest.approx([1, 0])
    assert attention.top_share(maps)[0, 1] == 1 and attention.top_share(maps)[0, 0] < 0.5
    sentence = attention.Sentence([], maps, attention.top_share(maps), attention.evenness(maps))
    assert (sentence.heavy(1), sentence.uniform(1)) == ([(0, 1)], [(0, 0)])


def test_windows_begin_with_bos_and_lose_no_token():
    texts = {"a": [0, 1, 2], "b": [0, 3, 4, 5, 6, 7, 8, 9]}
    assert list(windows(texts, texts.get, 4, 0)) == [[0, 1, 2, 0], [0, 3, 4, 5], [0, 6, 7, 8]]
    assert list(windows(texts, texts.get, 3, None)) == [[0, 1, 2], [0, 3, 4], [5, 6, 7]]
