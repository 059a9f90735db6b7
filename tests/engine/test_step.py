"""The decode step: replaying equals calling, and decoding equals reading the whole text at once."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dejavu
from dejavu.config import SelectionConfig
from dejavu.engine.crossover import Costs
from dejavu.engine.scoring import Request, Scorer
from dejavu.engine.step import DecodeStep
from dejavu.errors import CapacityError, ConfigError, NotFiniteError
from dejavu.selection import make_selector

IDS = [0, *b"the quick brown fox"]
VARIANTS = [
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "hidden_act": "silu"}),
]


def decode(step: DecodeStep, prompt: list[int], rest: list[int]) -> torch.Tensor:
    """Logits after the prompt and after each of `rest`, from row 0."""
    out = [step.prefill(0, prompt)]
    for token in rest:
        step.feed(0, token)
        out.append(step.run()[0].clone())
    return torch.stack(out)


@pytest.mark.parametrize("model_type, settings", VARIANTS)
def test_decode_equals_teacher_forcing(tiny_checkpoint, backend, model_type, settings):
    engine = dejavu.load(tiny_checkpoint(model_type, **settings), backend=backend)
    whole = engine.logits(IDS)
    for mode in {"dense", engine.mode}:
        stepped = decode(DecodeStep(engine.decoder, 1, len(IDS), mode), IDS[:4], IDS[4:])
        # float32: the sums are the same and their order is not; logits are of order 10
        torch.testing.assert_close(stepped, whole[3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_the_graph_equals_plain_calls_bit_for_bit(tiny_checkpoint, mode):
    decoder = dejavu.load(tiny_checkpoint("llama"), backend="cpu").decoder
    graph, plain = (DecodeStep(decoder, 1, len(IDS), mode, captured=captured) for captured in (True, False))
    assert (graph.op_seconds() is not None, plain.op_seconds()) == (True, None)
    graph.restart()
    assert torch.equal(decode(graph, IDS[:4], IDS[4:]), decode(plain, IDS[:4], IDS[4:]))
    assert torch.equal(graph.rows_read, plain.rows_read)


def test_a_row_that_is_not_fed_stays_as_it_is(tiny_checkpoint, backend):
    decoder = dejavu.load(tiny_checkpoint(), backend=backend).decoder
    step = DecodeStep(decoder, 2, len(IDS), "dense")
    step.prefill(0, IDS[:5])
    step.prefill(1, IDS)  # full: its position must never move on
    before = step.cache.k[:, 1].clone()
    for token in IDS[5:]:
        step.feed(0, token)
        step.run()
    assert step.lengths == [len(IDS), len(IDS)]
    # float32: prefill and step sum the last token's keys in different orders
    torch.testing.assert_close(step.cache.k[:, 1], before, rtol=0, atol=1e-4)


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
    step = DecodeStep(dejavu.load(folder, backend=backend, mode=mode).decoder, 2, len(IDS), mode)
    for row in (0, 1):
        step.prefill(row, [5, 6])
        step.feed(row, 7)
    step.run()
    step.feed(0, 8)
    step.feed(1, 9)
    with pytest.raises(NotFiniteError, match="the embedding for token 3 gives NaN or infinity"):
        step.run()


def test_ids_rows_and_places_are_checked_before_they_are_used(tiny_checkpoint, backend):
    step = DecodeStep(dejavu.load(tiny_checkpoint(), backend=backend).decoder, 2, 4, "dense")
    step.prefill(0, [5, 6, 7])
    step.feed(0, 8)
    step.run()
    before = [t.clone() for t in (step.cache.k, step.cache.v)]
    for row, token, error, message in (
        (0, 9, CapacityError, "row 0 is full: the cache holds 4 tokens"),
        (2, 9, ConfigError, r"row must be in \[0, 2\), found 2"),
        (-1, 9, ConfigError, r"row must be in"),
        (1, 257, ConfigError, r"token ids must be in \[0, 257\), found 257"),
        (1, -1, ConfigError, "found -1"),
    ):
        with pytest.raises(error, match=message):
            step.feed(row, token)
        if row != 0:
            with pytest.raises(error, match=message):
                step.prefill(row, [token])
    for ids in ([], [5] * 5):
        with pytest.raises(CapacityError, match=f"holds 1 to 4 tokens a row, found {len(ids)}"):
            step.prefill(1, ids)
    step.run()
    for ours, kept in zip((step.cache.k, step.cache.v), before, strict=True):
        assert torch.equal(ours[:, 0], kept[:, 0])


def test_an_interrupt_while_recording_anew_leaves_the_step_as_it_was(tiny_checkpoint, monkeypatch):
    decoder = dejavu.load(tiny_checkpoint(), backend="cpu").decoder
    never = Costs((9.0, 0.0), 1.0, (9.0, 0.0, 0.0), (1.0, 0.0))
    chosen = SelectionConfig("random", 0.4, 0.5)

    def run(interrupt: bool) -> tuple[list[int], list[list[int]]]:
        selector = make_selector(chosen, decoder.config, decoder.weights, decoder.ops)
        step = DecodeStep(decoder, 2, 64, "sparse", selector, 4, never if interrupt else None)
        for row in (0, 1):
            step.prefill(row, [5, 6])
        step.restart()
        record = decoder.ops.record

        def stop(*args):
            record(*args)
            raise KeyboardInterrupt

        if interrupt:
            monkeypatch.setattr(decoder.ops, "record", stop, raising=False)
        for token in range(8):
            for row in (0, 1):
                step.feed(row, token)
            try:
                step.run()
                assert not interrupt or token not in (3, 7)
            except KeyboardInterrupt:
                assert token in (3, 7)
        monkeypatch.undo()
        return step.heads_read.tolist(), step.rows_read.tolist()

    assert run(interrupt=True) == run(interrupt=False)


FORK = """
import os, signal, sys
import dejavu
from dejavu.engine.step import DecodeStep
step = DecodeStep(dejavu.load(threads=2).decoder, 1, 16, "exact")
step.prefill(0, [5, 6, 7]); step.feed(0, 8)
mine = step.run().clone()
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert bool((step.run() == mine).all()) or sys.exit(3)
    sys.exit(7)
again = os.fork()
if again == 0:
    signal.alarm(60)
    sys.exit(8)  # one that never runs a step ends too
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (child, again)], bool((step.run() == mine).all()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_runs_steps_and_ends():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[7, 8] True", run.stderr
