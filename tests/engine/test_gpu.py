"""The engine on an NVIDIA GPU: the same text as the reference, captured, in batches and in every mode."""

import pytest
import torch

import dejavu
from dejavu.engine import crossover
from dejavu.engine.crossover import Costs, measure_costs, union_densities
from dejavu.engine.step import DecodeStep, Steps
from dejavu.selection import Cut, make_selector
from dejavu.selection.block import Block
from dejavu.selection.pack import Pack, Point
from dejavu.selection.predictor import Lookahead, Predictor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_text_is_the_reference_backends(tiny_checkpoint, mode):
    folder = tiny_checkpoint()
    ours = dejavu.load(folder, dtype="fp32", backend="triton", mode=mode)
    theirs = dejavu.load(folder, dtype="fp32", backend="reference", mode=mode)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for a, b in zip(
        ours.generate(prompts, max_new_tokens=30), theirs.generate(prompts, max_new_tokens=30), strict=True
    ):
        assert a.token_ids == b.token_ids
        assert a.stats.step_bytes == pytest.approx(b.stats.step_bytes)


@pytest.mark.parametrize("kv", ["lazy", "full"])
@pytest.mark.parametrize("policy", ["random", "static", "oracle", "non_contextual"])
def test_sparse_text_is_the_reference_backends(tiny_checkpoint, policy, kv):
    if (policy, kv) == ("oracle", "lazy"):
        pytest.skip("the oracle computes every head before it chooses")
    folder = tiny_checkpoint()
    # What is read whole depends on the machine's speed, and the reference backend measures none.
    selection = dejavu.SelectionConfig(policy, 0.4, 0.5, kv=kv, pending=4, seed=3, crossover=False)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    texts = []
    for backend in ("triton", "reference"):
        calibration = "the quick brown fox" if policy == "static" else None
        engine = dejavu.load(folder, dtype="fp32", backend=backend, selection=selection, calibration=calibration)
        texts.append(engine.generate(prompts, max_new_tokens=30))
    for ours, theirs in zip(*texts, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.stats.step_bytes == pytest.approx(theirs.stats.step_bytes)


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]]], ids=["one", "batch"])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g32z"])
def test_quantised_text_is_the_reference_backends(tiny_checkpoint, weights, prompts):
    folder, settings = tiny_checkpoint(), {"dtype": "fp32", "weights": weights, "quantize_embeddings": True}
    ours, theirs = (
        dejavu.load(folder, backend=backend, **settings).generate(prompts, max_new_tokens=30)
        for backend in ("triton", "reference")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert a.stats.step_bytes == pytest.approx(b.stats.step_bytes)


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]]], ids=["one", "batch"])
def test_a_packs_text_is_the_reference_backends(tiny_checkpoint, tmp_path, prompts, weights):
    """Predictors of random weights, beside the step on a second stream."""
    folder = tiny_checkpoint()
    engine = dejavu.load(folder, backend="reference", dtype="fp32")
    c = engine.decoder.config
    generator = torch.Generator().manual_seed(0)
    predictors, cuts = {}, []
    for block in Block.all(c.num_hidden_layers):
        units = (c.num_attention_heads, c.intermediate_size)[block.part]
        up = torch.randn(units, 16, generator=generator).bfloat16()
        down = (torch.randn(16, c.hidden_size, generator=generator) / 4).bfloat16()
        predictors[block] = Predictor(down, up, torch.zeros(units))
        cuts.append(Cut(units // 2 + 1, 0.5))
    measured = {"ppl_increase": 0.0, "kl": 0.0, "mlp_density": 0.5, "attn_density": 0.5, "bytes": 1.0}
    base = {"name": "tiny", "hash": engine.checkpoint.hash}
    Pack(base, Lookahead(), predictors, [Point(tuple(cuts), measured)], 0).save(tmp_path / "pack")
    # What is read whole depends on the machine's speed, and the reference backend measures none.
    selection = dejavu.SelectionConfig("predictor", pack=str(tmp_path / "pack"), kv="lazy", crossover=False)
    settings = {"dtype": "fp32", "selection": selection} | ({} if weights is None else {"weights": weights})
    ours, theirs = (
        dejavu.load(folder, backend=backend, **settings).generate(prompts, max_new_tokens=30)
        for backend in ("triton", "reference")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert a.stats.step_bytes == pytest.approx(b.stats.step_bytes)


def test_sparse_graph_equals_eager_bit_for_bit_with_lookahead_beside(tiny_checkpoint):
    """The step is replayed while a second stream scores what comes next; in line the logits are the same."""
    engine = dejavu.load(tiny_checkpoint(), backend="triton")
    d = engine.decoder
    torch.manual_seed(0)
    L, C, H, inter = (
        getattr(d.config, n) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    )

    class Lookahead:
        capturable = True

        def __init__(self):
            torch.manual_seed(0)
            self.weights = [(torch.randn(H, C, device="cuda"), torch.randn(inter, C, device="cuda")) for _ in range(L)]

        def fresh(self):
            return self

        def restart(self):
            pass

        def advance(self):
            pass

        def begin(self, x, tokens):
            self._heads = None

        def collect(self, layer, part):
            pass

        def heads(self, layer, y, attend):
            result = None if self._heads is None else self._heads()
            neurons = self.weights[layer][1]
            self._neurons = d.ops.beside(lambda: d.ops.select_topk(d.ops.linear(y, neurons), inter // 3), y)
            return result

        def neurons(self, layer, y):
            result, self._heads = self._neurons(), None
            if layer + 1 < L:
                heads = self.weights[layer + 1][0]
                self._heads = d.ops.beside(lambda: d.ops.select_topk(d.ops.linear(y, heads), H // 2), y)
            return result

    def logits():
        step = DecodeStep(d, d.new_cache(1, 32, 4), 1, "sparse", Lookahead())
        out = [d.prefill(torch.tensor([1, 2, 3]), step.cache).cpu()]
        out += [step.run([token], [0])[0].clone() for token in range(4, 30)]
        return torch.stack(out), step.counts.heads_read, step.counts.rows_read

    overlapped = logits()
    with d.ops.sequential():
        for a, b in zip(overlapped, logits(), strict=True):
            assert torch.equal(a, b)
    assert overlapped[1].tolist() == [26 * H] + [26 * (H // 2)] * (L - 1)


def test_steps_of_several_sizes_over_one_cache_equal_the_reference(tiny_checkpoint, monkeypatch):
    """Rows join and leave, several tokens of a row, padding, lazy keys and values; parts read whole in steps of two."""
    folder, selection = tiny_checkpoint("llama"), dejavu.SelectionConfig("random", 0.4, 0.5, kv="lazy", seed=3)
    never = Costs((9.0, 0.0), 1.0, (0.0, 0.0, 0.0), (1.0, 0.0))
    runs = [([5, 6, 7], [2, 2, 0]), ([8], [2]), ([9, 9], [0, 1]), ([1, 2, 3, 4, 5], [1, 1, 2, 0, 0]), ([3], [1])]
    results = []
    for backend in ("triton", "reference"):
        d = dejavu.load(folder, dtype="fp32", backend=backend).decoder
        selector = make_selector(selection, d.config, d.weights, d.ops)
        if backend == "triton":
            assert measure_costs(d, 2, 4, selector).heads_whole > 0
            assert union_densities(d, 2, 4, selector)[0][0] == pytest.approx(0.5)
        monkeypatch.setattr(crossover, "measure_costs", lambda *args: never)
        steps = Steps(d, d.new_cache(3, 64, 4), "sparse", selector, crossover=True)
        if backend == "reference":  # which captures nothing, and so measures nothing
            steps._whole[2], steps._crossover = frozenset({(0, 0), (1, 0)}), True
            monkeypatch.setattr(crossover, "whole_blocks", lambda *args: frozenset({(0, 0), (1, 0)}))
            steps._whole |= {size: frozenset({(0, 0), (1, 0)}) for size in (4, 8)}
        for row in (0, 1, 2):
            d.prefill(torch.tensor([1, 2, 3 + row]), steps.cache, row)
        out = [steps.run(ids, rows).clone() for _ in range(3) for ids, rows in runs]
        if backend == "triton":
            assert steps.whole(2) == steps.whole(8) == ((0, 1), ())
        results.append((torch.cat(out), steps.counts.rows_read.cpu(), steps.counts.attn_read.cpu()))
        monkeypatch.undo()
    (ours, *counts), (theirs, *expected) = results
    assert all(torch.equal(a, b) for a, b in zip(counts, expected, strict=True))
    logits = [ours, theirs]
    # float32 on both; GEMMs of the prompt differ most
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
