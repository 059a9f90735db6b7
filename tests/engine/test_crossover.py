"""Past the crossover: what is decided from costs and densities, what steps then read, and that both are measured."""

from types import SimpleNamespace

import pytest
import torch

import dejavu
from dejavu.config import SelectionConfig
from dejavu.engine import crossover
from dejavu.engine.crossover import Costs, measure_costs, too_dense, union_densities
from dejavu.engine.step import Steps
from dejavu.kernels import backend
from dejavu.selection import Cut, make_selector
from dejavu.selection.block import Block
from dejavu.selection.predictor import Lookahead, Predictor, PredictorSelector

# Whole: 1 ms each; selections pay below a density of 0.5 (heads) and 0.6 (neurons that are all active).
COSTS = Costs((0.5, 1.0), 1.0, (0.1, 0.5, 1.0), (0.5, 0.5))
NEVER = Costs((9.0, 0.0), 1.0, (9.0, 0.0, 0.0), (1.0, 0.0))
ALWAYS = Costs((0.0, 0.0), 1.0, (0.0, 0.0, 0.0), (1.0, 0.0))
IDS = [0, *b"the quick brown fox jumps over it"]


@pytest.fixture
def decoder(tiny_checkpoint):
    return dejavu.load(tiny_checkpoint(), backend="cpu", dtype="fp32").decoder


def selector(decoder, policy="random", mlp=0.3, attn=0.5, kv="lazy"):
    config = SelectionConfig(policy, mlp, attn, kv=kv, seed=3)
    return make_selector(config, decoder.config, decoder.weights, decoder.ops)


def decode(decoder, chooser=None, pending=None, mode="sparse", crosses=True):
    """Logits of two texts after every token that follows their prompts, read in steps of 2; and the steps."""
    steps = Steps(decoder, decoder.new_cache(2, 64, pending), mode, chooser, crossover=crosses)
    for row in (0, 1):
        decoder.prefill(torch.tensor(IDS[row : row + 6]), steps.cache, row)
    out = [steps.run([IDS[at], IDS[at + 1]], [0, 1]).clone() for at in range(6, len(IDS) - 1)]
    return torch.stack(out), steps


@pytest.fixture
def costs(monkeypatch):
    """`costs(c)`: what is measured from now on."""
    return lambda value: monkeypatch.setattr(crossover, "measure_costs", lambda *args: value)


def test_decisions_from_given_costs():
    assert [COSTS.heads_faster_whole(d) for d in (0.25, 0.5, 0.75)] == [False, False, True]
    # All active: 0.1 + 1.5 d against 0.5 + 0.5 d.
    assert [COSTS.neurons_faster_whole(d, d) for d in (0.1, 0.39, 0.41, 1.0)] == [False, False, True, True]
    # Few of those selected are active, and whole MLPs skip the others too: 0.1 + 0.5 d against 0.45.
    assert [COSTS.neurons_faster_whole(d, 0.05) for d in (0.5, 0.7, 0.8)] == [False, False, True]
    # What choosing takes counts.
    chosen = Costs((0.5, 1.0), 1.0, (0.1, 0.5, 1.0), (0.5, 0.5), choosing=(0.3, 0.4))
    assert [chosen.heads_faster_whole(d) for d in (0.15, 0.25)] == [False, True]
    assert chosen.neurons_faster_whole(0.1, 0.1)


@pytest.mark.parametrize("pending", [None, 3, 64])
def test_past_the_crossover_a_step_is_dense(decoder, costs, pending):
    costs(NEVER)
    ours, steps = decode(decoder, selector(decoder), pending)
    assert steps.whole(2) == ((0, 1), (0, 1)) and steps.whole(1) == ((), ())
    assert torch.equal(ours, decode(decoder, mode="dense")[0])
    c, n = decoder.config, len(ours)
    assert (steps.counts.heads_read == n * c.num_attention_heads).all()
    assert (steps.counts.rows_read[:, 0] == n * c.intermediate_size).all()


def test_where_selections_pay_nothing_changes(decoder, costs):
    costs(ALWAYS)
    ours, steps = decode(decoder, selector(decoder), 8)
    assert torch.equal(ours, decode(decoder, selector(decoder), 8, crosses=False)[0])
    assert steps.whole(2) == ((), ())


def test_each_layer_goes_its_own_way(decoder, costs):
    """Layer 0 keeps 20 % of its neurons, layer 1 80 %; heads pay in neither."""
    costs(Costs((9.0, 0.0), 1.0, (0.0, 1.0, 0.0), (0.5, 0.0)))
    _, steps = decode(decoder, selector(decoder, mlp=(0.2, 0.8)), 8)
    assert steps.whole(2) == ((0, 1), (1,))


def test_densities_are_of_unions(decoder):
    """Of static sets a union is each; of random ones it is what chance says, more for more texts."""
    chooser = selector(decoder)
    H, I = decoder.config.num_attention_heads, decoder.config.intermediate_size  # noqa: E741
    one, four = (union_densities(decoder, size, 3, chooser) for size in (1, 4))
    for heads, rows in (one, four):  # the random policy draws a set a step, for all its tokens
        assert heads == pytest.approx([2 / H] * 2) and [r[0] for r in rows] == pytest.approx([15 / I] * 2)
    signs = selector(decoder, "signs", attn=1.0)
    alone, together = (union_densities(decoder, size, None, signs)[1][0][0] for size in (1, 4))
    assert alone == pytest.approx(15 / I) and alone < together <= 4 * alone
    assert union_densities(decoder, 4, None, signs)[1][0][0] == together


def test_a_decision_needs_a_selection():
    cuts = SimpleNamespace(cuts=[(None, Cut(3)), (Cut(2), None)])
    assert too_dense(NEVER, ([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]), cuts) == {(0, 1), (1, 0)}
    assert too_dense(ALWAYS, ([1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]), cuts) == set()


def test_a_predictor_of_a_part_read_whole_is_not_run():
    calls = []

    class Spy(Predictor):
        def scores(self, linear, y):
            calls.append(id(self))
            return super().scores(linear, y)

    ops, config = backend("reference"), SimpleNamespace(num_hidden_layers=2)
    torch.manual_seed(0)
    spies = {block: Spy(None, torch.randn(8, 4), torch.zeros(8)) for block in Block.all(2)}
    every = PredictorSelector(spies, Lookahead(), [(Cut(2), Cut(3))] * 2, config, ops)
    fewer, y = every.without({(0, 1), (1, 0)}), torch.randn(1, 4)

    def run(s):
        calls.clear()
        s.begin(y, None)
        return [selection and int(selection[1]) for i in (0, 1) for selection in (s.heads(i, y, None), s.neurons(i, y))]

    assert run(fewer) == [2, None, None, 3]
    assert sorted(calls) == sorted(id(spies[block]) for block in (Block(0, 0), Block(1, 1)))
    assert fewer.nbytes == every.nbytes / 2
    assert run(every) == [2, 3, 2, 3]  # which is as it was
    assert len(calls) == 4


@pytest.mark.parametrize("model_type, settings", [("opt", {}), ("llama", {}), ("llama", {"hidden_act": "silu"})])
@pytest.mark.parametrize("pending", [None, 4])
def test_costs_are_measured(tiny_checkpoint, model_type, settings, pending):
    decoder = dejavu.load(tiny_checkpoint(model_type, **settings), backend="cpu").decoder
    chooser = selector(decoder, "signs", attn=1.0)
    costs = measure_costs(decoder, 2, pending, chooser)
    assert costs.heads_whole > 0 and costs.neurons_whole[0] > 0
    assert costs.choosing[1] > 0
    if settings.get("hidden_act") == "silu":
        assert costs.neurons[2] == costs.neurons_whole[1] == 0


def test_they_are_measured_once_for_each_size(decoder, monkeypatch):
    sizes = []
    monkeypatch.setattr(crossover, "measure_costs", lambda decoder, size, *args: sizes.append(size) or NEVER)
    chooser = selector(decoder)
    for _ in range(2):
        steps = Steps(decoder, decoder.new_cache(4, 16), "sparse", chooser, crossover=True)
        for size in (1, 2, 4, 2):
            steps.step(size)
    assert sizes == [2, 4]


def test_an_engine_obeys_its_setting(tiny_checkpoint, costs):
    costs(NEVER)
    whole = []
    for on in (True, False):
        selection = SelectionConfig("random", 0.3, 0.5, kv="lazy", crossover=on)
        engine = dejavu.load(tiny_checkpoint(), backend="cpu", selection=selection)
        whole.append(engine.generate([[1, 2], [3]], max_new_tokens=8, ignore_eos=True)[0].stats.whole)
        assert engine.new_steps(2, 16, crossover=False).whole(2) == ((), ())
    assert whole == [((0, 1), (0, 1)), ((), ())]
