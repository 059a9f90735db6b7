"""Past the crossover: what is decided from given costs, what a step then reads, and that measuring gives costs."""

from types import SimpleNamespace

import pytest
import torch

import dejavu
from dejavu.config import SelectionConfig
from dejavu.engine.crossover import Costs, measure_costs
from dejavu.engine.step import FIRST_LOOK, DecodeStep
from dejavu.kernels import backend
from dejavu.selection import Cut, make_selector
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


def decode(step, prompt=6):
    """Logits after every token that follows the prompt."""
    step.prefill(0, IDS[:prompt])
    step.restart()
    out = []
    for token in IDS[prompt:]:
        step.feed(0, token)
        out.append(step.run()[0].clone())
    return torch.stack(out)


def test_decisions_from_given_costs():
    assert [COSTS.heads_dense(d) for d in (0.25, 0.5, 0.75)] == [False, False, True]
    # All active: 0.1 + 1.5 d against 0.5 + 0.5 d.
    assert [COSTS.neurons_dense(d, d) for d in (0.1, 0.39, 0.41, 1.0)] == [False, False, True, True]
    # Few of those selected are active, and whole MLPs skip the others too: 0.1 + 0.5 d against 0.45.
    assert [COSTS.neurons_dense(d, 0.05) for d in (0.5, 0.7, 0.8)] == [False, False, True]
    # What choosing takes counts.
    chosen = Costs((0.5, 1.0), 1.0, (0.1, 0.5, 1.0), (0.5, 0.5), choosing=(0.3, 0.4))
    assert [chosen.heads_dense(d) for d in (0.15, 0.25)] == [False, True]
    assert chosen.neurons_dense(0.1, 0.1)


@pytest.mark.parametrize("pending", [None, 3, 64])
def test_past_the_crossover_a_step_is_dense(decoder, pending):
    """The keys and values that waited when attention came to be read whole are there afterwards."""
    plain = decode(DecodeStep(decoder, 1, 64, "sparse", selector(decoder), pending))
    step = DecodeStep(decoder, 1, 64, "sparse", selector(decoder), pending, NEVER)
    never = decode(step)
    assert step.whole == ((0, 1), (0, 1))
    assert torch.equal(never[:FIRST_LOOK], plain[:FIRST_LOOK])
    # From its state on, a step that obeys nothing else but reads everything gives the same, bit for bit.
    full = DecodeStep(decoder, 1, 64, "sparse", Then(selector(decoder), FIRST_LOOK), None)
    assert torch.equal(never, decode(full))
    sparse, dense = FIRST_LOOK, len(never) - FIRST_LOOK
    c = decoder.config
    assert (step.heads_read == sparse * 2 + dense * c.num_attention_heads).all()
    assert (step.rows_read[:, 0] == sparse * 15 + dense * c.intermediate_size).all()


class Then:
    """A selector for some steps, and everything after them; keys and values are full, and nothing is captured."""

    capturable = False

    def __init__(self, selector, steps):
        self._selector, self._left = selector, steps + 1
        self.cuts, self.begin, self.collect = selector.cuts, selector.begin, selector.collect

    def fresh(self):
        return self

    def restart(self):
        self._selector.restart()

    def advance(self):
        self._selector.advance()
        self._left -= 1

    def heads(self, *args):
        return self._selector.heads(*args) if self._left > 0 else None

    def neurons(self, *args):
        return self._selector.neurons(*args) if self._left > 0 else None


def test_where_selections_pay_nothing_changes(decoder):
    plain = decode(DecodeStep(decoder, 1, 64, "sparse", selector(decoder), 8))
    step = DecodeStep(decoder, 1, 64, "sparse", selector(decoder), 8, ALWAYS)
    assert torch.equal(decode(step), plain)
    assert step.whole == ((), ())


def test_each_layer_goes_its_own_way(decoder):
    """Layer 0 keeps 20 % of its neurons, layer 1 80 %; heads pay in neither."""
    costs = Costs((9.0, 0.0), 1.0, (0.0, 1.0, 0.0), (0.5, 0.0))
    step = DecodeStep(decoder, 1, 64, "sparse", selector(decoder, mlp=(0.2, 0.8)), 8, costs)
    decode(step)
    assert step.whole == ((0, 1), (1,))


def test_a_predictor_of_a_part_read_whole_is_not_run():
    calls = []

    class Spy(Predictor):
        def scores(self, linear, y):
            calls.append(id(self))
            return super().scores(linear, y)

    ops, config = backend("reference"), SimpleNamespace(num_hidden_layers=2)
    torch.manual_seed(0)
    spies = {block: Spy(None, torch.randn(8, 4), torch.zeros(8)) for block in range(4)}
    every = PredictorSelector(spies, Lookahead(), [(Cut(2), Cut(3))] * 2, config, ops)
    fewer, y = every.without({(0, 1), (1, 0)}), torch.randn(1, 4)

    def run(s):
        calls.clear()
        s.begin(y)
        return [selection and int(selection[1]) for i in (0, 1) for selection in (s.heads(i, y, None), s.neurons(i, y))]

    assert run(fewer) == [2, None, None, 3]
    assert sorted(calls) == sorted(id(spies[block]) for block in (0, 3))
    assert fewer.nbytes == every.nbytes / 2
    assert run(every) == [2, 3, 2, 3]  # which is as it was
    assert len(calls) == 4


@pytest.mark.parametrize("model_type, settings", [("opt", {}), ("llama", {}), ("llama", {"hidden_act": "silu"})])
@pytest.mark.parametrize("pending", [None, 4])
def test_costs_are_measured_once(tiny_checkpoint, model_type, settings, pending):
    decoder = dejavu.load(tiny_checkpoint(model_type, **settings), backend="cpu").decoder
    chooser = selector(decoder, "signs", attn=1.0)
    costs = measure_costs(decoder, 2, pending, chooser)
    assert costs.heads_whole > 0 and costs.neurons_whole[0] > 0
    assert costs.choosing[1] > 0
    if settings.get("hidden_act") == "silu":
        assert costs.neurons[2] == costs.neurons_whole[1] == 0
    assert measure_costs(decoder, 2, pending, chooser) is costs
    assert measure_costs(decoder, 3, pending, chooser) is not costs


def test_an_engine_obeys_its_setting(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("dejavu.engine.engine.measure_costs", lambda *args: NEVER)
    whole = []
    for crossover in (True, False):
        selection = SelectionConfig("random", 0.3, 0.5, kv="lazy", crossover=crossover)
        engine = dejavu.load(tiny_checkpoint(), backend="cpu", selection=selection)
        whole.append(engine.generate([[1, 2], [3]], max_new_tokens=8, ignore_eos=True)[0].stats.whole)
        assert engine.new_step(1, 16, crossover=False).whole == ((), ())
    assert whole == [((0, 1), (0, 1)), ((), ())]
