"""Every policy through the real decode step, on the bundled trained model."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import dejavu
from dejavu.config import SelectionConfig
from dejavu.engine.step import DecodeStep
from dejavu.errors import ConfigError
from dejavu.model.hooks import TokenMasks
from dejavu.selection import make_selector
from dejavu.selection.oracle import Importance

TEXT = """The river rises in the hills to the north of the town and flows south for about forty miles before it
reaches the sea. In the nineteenth century several mills were built along its banks, and the water was used to drive
their wheels. Most of them were closed after the railway came."""
POLICIES = ("oracle", "static", "non_contextual", "random", "nearest", "signs")


@pytest.fixture(scope="module")
def model():
    engine = dejavu.load("opt-mini", dtype="fp32")
    decoder, ids = engine.decoder, engine.tokenizer.encode(TEXT)
    importance = Importance(decoder.config, decoder.weights, decoder.ops)
    run(SimpleNamespace(decoder=decoder, ids=ids), importance)
    return SimpleNamespace(decoder=decoder, ids=ids, importance=importance.total)


def run(model, selector=None, *, mode="sparse", pending=None, rows=1, eager=False):
    """Teacher-forced logits (T, rows, V) of the text, all but 8 tokens through real decode steps; and the step."""
    decoder = model.decoder
    step = DecodeStep(decoder, decoder.new_cache(rows, 128, pending), rows, mode, selector, captured=not eager)
    for row in range(rows):
        decoder.prefill(torch.tensor(model.ids[row : row + 8]), step.cache, row)
    every = range(rows)
    out = [step.run([model.ids[row + i] for row in every], every).clone() for i in range(8, len(model.ids) - rows)]
    return torch.stack(out), step


def select(model, policy, **settings):
    if policy == "nearest" and settings.get("attn_density", 1) == 1:
        pytest.importorskip("hnswlib")
    decoder = model.decoder
    config = SelectionConfig(policy, **settings)
    return make_selector(config, decoder.config, decoder.weights, decoder.ops, importance=model.importance)


def loss(model, logits):
    targets = torch.tensor(model.ids[9 : 9 + len(logits) - 1])
    return torch.nn.functional.cross_entropy(logits[:-1, 0], targets).item()


@pytest.mark.parametrize("policy", POLICIES)
def test_density_one_is_dense(model, policy):
    dense, _ = run(model, mode="dense")
    sparse, _ = run(model, select(model, policy))
    assert torch.equal(dense, sparse)


def test_everything_selected_by_index_is_dense_bit_for_bit(model):
    """Unlike density 1, which selects by None: the selecting kernels themselves run over all heads and neurons."""

    class Everything:
        capturable = True

        def __init__(self, *totals):
            self.all = [(torch.arange(n, dtype=torch.int32), torch.tensor([n], dtype=torch.int32)) for n in totals]

        def fresh(self):
            return self

        def restart(self): ...

        def advance(self): ...

        def begin(self, x, tokens): ...

        def collect(self, layer, part): ...

        def heads(self, layer, y, attend):
            return self.all[0]

        def neurons(self, layer, y):
            return self.all[1]

    c = model.decoder.config
    dense, _ = run(model, mode="dense")
    sparse, _ = run(model, Everything(c.num_attention_heads, c.intermediate_size))
    assert torch.equal(dense, sparse)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_sparse_kernels_read_what_is_selected(model, policy):
    _, step = run(model, select(model, policy, mlp_density=0.1, dense_layers=(1,)))
    steps = len(model.ids) - 9
    expected = torch.full((8,), 205 * steps)
    expected[1] = 2048 * steps
    assert torch.equal(step.counts.rows_read[:, 0], expected)
    assert (step.counts.rows_read[:, 1] <= step.counts.rows_read[:, 0]).all()


def test_context_is_worth_something(model):
    """The paper's Figure 1(2): at one density the oracle is near dense, and what ignores the context is far off."""
    dense = loss(model, run(model, mode="dense")[0])
    at = {p: loss(model, run(model, select(model, p, mlp_density=0.1))[0]) for p in POLICIES if p != "nearest"}
    assert at["oracle"] < dense + 0.2
    assert min(at["static"], at["non_contextual"]) > at["oracle"] + 0.3
    assert at["random"] > at["static"]


@pytest.mark.parametrize("policy", ["static", "random", "signs"])
def test_graph_equals_eager(model, policy):
    settings = {"mlp_density": 0.2, "attn_density": 1.0 if policy == "signs" else 0.5}
    captured, _ = run(model, select(model, policy, **settings), pending=4)
    eager, _ = run(model, select(model, policy, **settings), pending=4, eager=True)
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("pending", [1, 3, 64])
def test_lazy_keys_and_values_equal_full(model, pending):
    full, _ = run(model, select(model, "random", attn_density=0.3, seed=5))
    lazy, _ = run(model, select(model, "random", attn_density=0.3, seed=5, kv="lazy"), pending=pending)
    assert torch.equal(full, lazy)


@pytest.mark.parametrize("policy", ["static", "oracle"])
def test_a_batch_reads_the_union(model, policy):
    """A row of a batch keeps at least its own units: static sets are the same for all, so the row is unchanged."""
    settings = {"mlp_density": 0.1}
    alone, _ = run(model, select(model, policy, **settings))
    together, step = run(model, select(model, policy, **settings), rows=3)
    read = step.counts.rows_read[:, 0] / len(together)
    if policy == "static":
        assert torch.equal(alone[: len(together), 0], together[:, 0])
        assert (read == 205).all()
    else:
        assert (read > 205).all() and (read <= 3 * 205).all()
        assert loss(model, together) < loss(model, alone) + 0.1


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "random"])  # random draws differ from pass to pass
def test_masks_of_a_forward_pass_equal_sparse_steps(model, policy):
    """What evaluation relies on: all positions at once, each with its own selection, give the logits of real steps."""
    settings = {
        "mlp_density": 0.15,
        "attn_density": 1.0 if policy in ("nearest", "signs") else 0.5,
        "dense_layers": (2,),
    }
    stepped, step = run(model, select(model, policy, **settings))
    masks = TokenMasks(select(model, policy, **settings), dense_prefix=8)
    ids = torch.tensor(model.ids[: 8 + len(stepped)])
    cache = model.decoder.new_cache(1, len(ids))
    together = model.decoder.prefill(ids, cache, all_logits=True, hooks=masks)[8:]
    # Rounding may swap two units of near equal scores; they contribute next to nothing.
    assert (stepped[:, 0] - together).abs().max() < 2e-3
    assert masks.tokens == len(stepped)
    assert torch.equal(masks.kept[:, 1], step.counts.rows_read[:, 0])
    assert torch.equal(masks.kept[:, 0], step.counts.heads_read)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "random"])  # whose n-th step draws one set
def test_rows_that_come_and_go_select_as_if_alone(model, policy):
    """Two texts take turns in one cache, in steps with padding: each reads, and says, what it does alone."""
    settings = {"mlp_density": 0.15, "attn_density": 1.0 if policy in ("nearest", "signs") else 0.5}
    alone, step = run(model, select(model, policy, **settings), pending=4)
    decoder, starts = model.decoder, (0, 5)
    both = DecodeStep(decoder, decoder.new_cache(3, 128, 4), 4, "sparse", select(model, policy, **settings))
    for row, start in zip((2, 0), starts, strict=True):
        decoder.prefill(torch.tensor(model.ids[start : start + 8]), both.cache, row)
    for i in range(len(alone)):
        assert torch.equal(both.run([model.ids[8 + i]], [2])[0], alone[i, 0])
        if i < 20:
            both.run([model.ids[starts[1] + 8 + i]], [0])
        if i == 19:  # what the other text read is known, and the rest is this one's alone
            other = both.counts.attn_read.clone(), both.counts.rows_read.clone()
            mine = DecodeStep(decoder, decoder.new_cache(1, 128, 4), 1, "sparse", select(model, policy, **settings))
            decoder.prefill(torch.tensor(model.ids[:8]), mine.cache)
            for token in model.ids[8:28]:
                mine.run([token], [0])
    rest = (both.counts.attn_read - other[0], both.counts.rows_read - other[1])
    assert torch.equal(rest[0], step.counts.attn_read - mine.counts.attn_read)
    assert torch.equal(rest[1], step.counts.rows_read - mine.counts.rows_read)


def test_bad_settings_are_named(model):
    for settings, message in [
        ({"mlp_density": 0.0}, r"mlp_density must be in \(0, 1\], found 0.0"),
        ({"attn_density": 1.5}, "attn_density"),
        ({"mlp_density": (0.1, 0.2)}, "the model has 8 layers, found 2 densities"),
        ({"dense_layers": (8,)}, "layers 0 to 7, found 8"),
        ({"kv": "eager"}, 'kv must be "lazy" or "full"'),
        ({"pending": 0}, "pending must be a positive integer"),
    ]:
        with pytest.raises(ConfigError, match=message):
            select(model, "oracle", **settings)
    with pytest.raises(ConfigError, match="policy 'best' does not exist"):
        SelectionConfig("best")
    with pytest.raises(ConfigError, match="selects neurons only"):
        select(model, "nearest", attn_density=0.5)
    with pytest.raises(ConfigError, match="policy signs selects neurons only"):
        select(model, "signs", attn_density=0.5)
    with pytest.raises(ConfigError, match="use kv full"):
        select(model, "oracle", attn_density=0.5, kv="lazy")
    decoder = model.decoder
    with pytest.raises(ConfigError, match="needs a calibration text"):
        make_selector(SelectionConfig("static", 0.5), decoder.config, decoder.weights, decoder.ops)


ENGINES = [*((policy, kv) for policy in ("static", "random", "signs") for kv in ("full", "lazy")), ("oracle", "full"),
           ("non_contextual", "full"), ("nearest", "full"), ("predictor", "lazy")]  # fmt: skip


def engine(base: dejavu.Engine, policy: str, kv: str) -> dejavu.Engine:
    if policy == "predictor":
        return base.with_mode("sparse", SelectionConfig("predictor", pack="opt-mini", kv=kv))
    heads = 1.0 if policy in ("nearest", "signs") else 0.5
    calibration = TEXT if policy == "static" else None
    return base.with_mode("sparse", SelectionConfig(policy, 0.1, heads, kv=kv, seed=1), calibration)


@pytest.mark.parametrize(("policy", "kv"), ENGINES)
def test_the_same_call_gives_the_same_text_again_and_from_any_thread(policy, kv):
    """What a step remembers is the step's own, and nothing is left of the text before."""
    if policy == "nearest":
        pytest.importorskip("hnswlib")
    sparse = engine(dejavu.load("opt-mini"), policy, kv)
    prompts = ["The old house on the hill", "Once upon a time", "In the spring of 1842 the expedition"]
    how = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    alone = [sparse.generate(prompt, **how).token_ids for prompt in prompts]
    assert [sparse.generate(prompt, **how).token_ids for prompt in prompts] == alone
    together = [[g.token_ids for g in sparse.generate(prompts, **how)] for _ in range(2)]
    assert together[0] == together[1]
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(lambda prompt: sparse.generate(prompt, **how).token_ids, prompts * 3))
    assert texts == alone * 3
    # Passes over many tokens share the selector too.
    logits = [sparse.logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        for ours, theirs in zip(pool.map(sparse.logits, prompts), logits, strict=True):
            assert torch.equal(ours, theirs)
