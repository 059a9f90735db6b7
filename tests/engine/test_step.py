"""The decode step: replaying equals calling, and decoding equals reading the whole text at once."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dejavu
from dejavu.config import SelectionConfig
from dejavu.engine.scoring import Request, Scorer
from dejavu.engine.step import DecodeStep, Steps
from dejavu.errors import CapacityError, ConfigError, NotFiniteError
from dejavu.selection import make_selector

IDS = [0, *b"the quick brown fox"]
VARIANTS = [
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "hidden_act": "silu"}),
]


def new_step(decoder, mode, rows=1, selector=None, pending=None, captured=True) -> DecodeStep:
    return DecodeStep(decoder, decoder.new_cache(rows, len(IDS), pending), rows, mode, selector, captured=captured)


def prefill(step: DecodeStep, decoder, row: int, ids: list[int]) -> torch.Tensor:
    return decoder.prefill(torch.tensor(ids), step.cache, row)


def decode(step: DecodeStep, decoder, prompt: list[int], rest: list[int]) -> torch.Tensor:
    """Logits after the prompt and after each of `rest`, from row 0."""
    out = [prefill(step, decoder, 0, prompt)]
    return torch.stack(out + [step.run([token], [0])[0].clone() for token in rest])


@pytest.mark.parametrize("model_type, settings", VARIANTS)
def test_decode_equals_teacher_forcing(tiny_checkpoint, backend, model_type, settings):
    engine = dejavu.load(tiny_checkpoint(model_type, **settings), backend=backend)
    whole = engine.logits(IDS)
    for mode in {"dense", engine.mode}:
        stepped = decode(new_step(engine.decoder, mode), engine.decoder, IDS[:4], IDS[4:])
        # float32: the sums are the same and their order is not; logits are of order 10
        torch.testing.assert_close(stepped, whole[3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_the_graph_equals_plain_calls_bit_for_bit(tiny_checkpoint, mode):
    decoder = dejavu.load(tiny_checkpoint("llama"), backend="cpu").decoder
    graph, plain = (new_step(decoder, mode, captured=captured) for captured in (True, False))
    assert (graph.op_seconds([5], [0]) is not None, plain.op_seconds([5], [0])) == (True, None)
    graph.counts.reset()
    assert torch.equal(decode(graph, decoder, IDS[:4], IDS[4:]), decode(plain, decoder, IDS[:4], IDS[4:]))
    assert torch.equal(graph.counts.rows_read, plain.counts.rows_read)
    assert torch.equal(graph.counts.attn_read, plain.counts.attn_read)


@pytest.mark.parametrize("model_type, settings", VARIANTS)
@pytest.mark.parametrize("pending", [None, 3])
def test_rows_that_join_leave_and_pad_equal_each_row_alone(tiny_checkpoint, model_type, settings, pending):
    """Two sizes of steps over one cache, rows of any lengths and several tokens at a time: bit for bit on the CPU."""
    engine = dejavu.load(tiny_checkpoint(model_type, **settings), backend="cpu")
    decoder = engine.decoder
    texts = [[0, *b"the quick brown"], [0, *b"fox jumps"], [0, *b"over the lazy do"], [0, *b"gs"]]
    for mode in sorted({"dense", engine.mode}):
        alone = [decode(new_step(decoder, mode), decoder, text[:2], text[2:])[1:] for text in texts]
        steps = Steps(decoder, decoder.new_cache(3, len(IDS), pending), mode)
        waiting, running, out = list(range(4)), {}, [[] for _ in texts]
        rng = random.Random(1)
        while waiting or running:
            if waiting and len(running) < 3:  # the fourth text waits for a row that another has left
                text, row = waiting.pop(0), steps.cache.take()
                running[text] = row
                decoder.prefill(torch.tensor(texts[text][:2]), steps.cache, row)
            ids, rows, of = [], [], []
            for text in rng.sample(sorted(running), rng.randint(1, len(running))):
                row = running[text]
                at = steps.cache.length(row)
                for token in texts[text][at : at + rng.randint(1, 3)]:
                    ids, rows, of = [*ids, token], [*rows, row], [*of, text]
            size = None if len(ids) > 4 or rng.random() < 0.5 else 8
            for text, logits in zip(of, steps.run(ids, rows, size), strict=True):
                out[text].append(logits.clone())
            for text, row in list(running.items()):
                assert steps.cache.tokens(row) == tuple(texts[text][: steps.cache.length(row)])
                if steps.cache.length(row) == len(texts[text]):
                    steps.cache.release(running.pop(text))
        for ours, expected in zip(out, alone, strict=True):
            assert torch.equal(torch.stack(ours), expected)


def test_a_text_cut_short_goes_on_as_if_it_never_was_longer(tiny_checkpoint):
    for backend, pending in (("cpu", None), ("cpu", 3), ("reference", 3)):
        decoder = dejavu.load(tiny_checkpoint("llama"), backend=backend).decoder
        selector = selection_of(decoder, SelectionConfig("static", 0.5, 0.5, kv="lazy"))
        step = new_step(decoder, "sparse", 1, selector, pending)
        expected = decode(step, decoder, IDS[:4], IDS[4:])
        for cut in (4, 7, 13):
            step.cache.truncate(0, cut)
            step.run([9], [0])
            step.run([8], [0])
            step.cache.truncate(0, cut)
            again = torch.stack([step.run([token], [0])[0].clone() for token in IDS[cut:]])
            assert torch.equal(again, expected[cut - 3 :])


@pytest.mark.parametrize("pending", [None, 3])
def test_a_prompt_goes_on_behind_what_its_row_holds(tiny_checkpoint, backend, pending):
    """Steps and passes in turns, tokens that wait included, give what one pass gives."""
    decoder = dejavu.load(tiny_checkpoint("llama"), backend=backend).decoder
    selector = None if pending is None else selection_of(decoder, SelectionConfig("static", 1.0, 0.5))
    step = new_step(decoder, "dense" if pending is None else "sparse", 2, selector, pending)
    first = prefill(step, decoder, 1, IDS[:4])
    for token in IDS[4:9]:
        step.run([token], [1])
    rest = decoder.prefill(torch.tensor(IDS[9:]), step.cache, 1, all_logits=True)
    assert step.cache.tokens(1) == tuple(IDS)
    whole = decoder.prefill(torch.tensor(IDS), decoder.new_cache(1, len(IDS)), all_logits=True)
    torch.testing.assert_close(first, whole[3], rtol=0, atol=1e-4)
    if pending is None:
        torch.testing.assert_close(rest, whole[9:], rtol=0, atol=1e-4)
    else:  # five tokens lost half their heads, so that only what waited is comparable: to keys that did not wait
        full = new_step(decoder, "sparse", 1, selector)
        prefill(full, decoder, 0, IDS[:4])
        for token in IDS[4:9]:
            full.run([token], [0])
        expected = decoder.prefill(torch.tensor(IDS[9:]), full.cache, 0, all_logits=True)
        torch.testing.assert_close(rest, expected, rtol=0, atol=1e-4)


def selection_of(decoder, selection: SelectionConfig):
    c, generator = decoder.config, torch.Generator().manual_seed(0)
    sizes = c.num_attention_heads, c.intermediate_size
    importance = [tuple(torch.rand(n, generator=generator) for n in sizes) for _ in range(c.num_hidden_layers)]
    return make_selector(selection, c, decoder.weights, decoder.ops, importance=importance)


def broken(folder: Path, tensor: str, value: float = math.nan, row: int = 0) -> Path:
    """The checkpoint with one row of a tensor made of `value`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith(tensor))
    tensors[name][row] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensor", "value", "where"),
    [
        ("layers.1.self_attn.v_proj.weight", math.nan, "layer 1: its attention for token 0 gives"),
        ("layers.1.self_attn.v_proj.weight", math.inf, "layer 1: its attention for token 0 gives"),
        ("layers.0.self_attn.q_proj.weight", math.nan, "layer 0: its attention for token 0 gives"),
        ("layers.1.self_attn.k_proj.bias", math.inf, "layer 1: its attention for token 0 gives"),
        ("layers.0.fc1.weight", math.nan, "layer 0: its MLP for token 0 gives"),
        ("layers.1.fc2.bias", -math.inf, "layer 1: its MLP for token 0 gives"),
        ("final_layer_norm.weight", math.nan, None),
    ],
)
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_numbers_that_are_none_are_an_error_that_names_the_layer(tiny_checkpoint, backend, mode, tensor, value, where):
    if where is None:
        tensor = "decoder.final_layer_norm.weight"
    engine = dejavu.load(broken(tiny_checkpoint(), tensor, value), backend=backend, mode=mode)
    message = where or "the final norm or the LM head gives"
    for how in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.3}):
        with pytest.raises(NotFiniteError, match=message):
            engine.generate(IDS, max_new_tokens=3, **how)
    with pytest.raises(NotFiniteError, match=message):
        engine.logits(IDS)
    with pytest.raises(NotFiniteError, match=message):
        Scorer(engine).logits([Request(tuple(IDS), 3)])


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_a_step_notices_what_its_prompt_did_not_show(tiny_checkpoint, backend, mode):
    """The embedding of one token is broken, and the token comes after the prompt."""
    folder = broken(tiny_checkpoint(tie_word_embeddings=False), "embed_tokens.weight", math.nan, row=9)
    decoder = dejavu.load(folder, backend=backend, mode=mode).decoder
    step = new_step(decoder, mode, 2)
    for row in (0, 1):
        prefill(step, decoder, row, [5, 6])
    step.run([7, 7], [0, 1])
    with pytest.raises(NotFiniteError, match="the embedding for token 3 gives NaN or infinity"):
        step.run([8, 9], [0, 1])
    assert step.cache.tokens(0) == step.cache.tokens(1) == (5, 6, 7)
    step.run([8, 10], [0, 1])


def test_ids_rows_and_places_are_checked_before_they_are_used(tiny_checkpoint, backend):
    decoder = dejavu.load(tiny_checkpoint(), backend=backend).decoder
    step = DecodeStep(decoder, decoder.new_cache(2, 4), 4, "dense")
    prefill(step, decoder, 0, [5, 6, 7])
    step.run([8], [0])
    before = [t.clone() for t in (step.cache.k, step.cache.v)]
    for ids, rows, error, message in (
        ([9], [0], CapacityError, "row 0 is full: the cache holds 4 tokens a row, found 5"),
        ([9], [2], ConfigError, r"row must be in \[0, 2\), found 2"),
        ([9], [-1], ConfigError, r"row must be in"),
        ([257], [1], ConfigError, r"token ids must be in \[0, 257\), found 257"),
        ([-1], [1], ConfigError, "found -1"),
        ([], [], ConfigError, "takes 1 to 4 tokens, found 0"),
        ([1] * 5, [1] * 5, ConfigError, "takes 1 to 4 tokens, found 5"),
        ([1, 2], [1], ConfigError, "found 2 of 1 rows"),
        ([1, 2, 3], [1, 0, 1], (ConfigError, CapacityError), "row"),
    ):
        with pytest.raises(error, match=message):
            step.run(ids, rows)
    for row, ids in ((0, [1]), (1, [5] * 5)):
        with pytest.raises(CapacityError, match="holds 4 tokens a row, found 5"):
            prefill(step, decoder, row, ids)
    with pytest.raises(ConfigError, match="row must be in"):
        prefill(step, decoder, 2, [1])
    prefill(step, decoder, 1, [1])
    with pytest.raises(ConfigError, match="must stand together, found row 1 again"):
        DecodeStep(decoder, decoder.new_cache(2, 4), 4, "dense").run([1, 2, 3], [1, 0, 1])
    for ours, kept in zip((step.cache.k, step.cache.v), before, strict=True):
        assert torch.equal(ours[:, 0], kept[:, 0])


def test_lazy_rows_read_a_few_tokens_at_a_time(tiny_checkpoint):
    decoder = dejavu.load(tiny_checkpoint(), backend="cpu").decoder
    selector = selection_of(decoder, SelectionConfig("static", 0.5, 0.5, kv="lazy"))
    step = DecodeStep(decoder, decoder.new_cache(1, 64, 3), 16, "sparse", selector)
    step.run([1] * 8, [0] * 8)
    with pytest.raises(ConfigError, match="at most 8 tokens of a row, found 9"):
        step.run([1] * 9, [0] * 9)
    assert step.cache.length(0) == 8


FORK = """
import os, signal, sys
import dejavu
from dejavu.engine.step import DecodeStep
decoder = dejavu.load(threads=2).decoder
step = DecodeStep(decoder, decoder.new_cache(1, 16), 1, "exact")
def run():
    step.cache.truncate(0, 0)
    return [step.run([i], [0]).clone() for i in (5, 6, 7)][-1]
mine = run()
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert bool((run() == mine).all()) or sys.exit(3)
    sys.exit(7)
again = os.fork()
if again == 0:
    signal.alarm(60)
    sys.exit(8)  # one that never runs a step ends too
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (child, again)], bool((run() == mine).all()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_runs_steps_and_ends():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[7, 8] True", run.stderr
