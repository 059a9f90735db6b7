"""The timed loop runs our engine's own step, writes what Hugging Face writes, and counts the bytes it reads."""

import pytest
import torch

from dejavu.bench.decode import Dejavu, common_prefix, decode_times, greedy, random_prompt
from dejavu.bench.peers.hugging_face import HuggingFace, load_hugging_face
from dejavu.checkpoint.source import open_checkpoint
from dejavu.engine.bytes import step_bytes
from dejavu.families.load import load_weights
from dejavu.kernels import backend
from dejavu.model.decoder import Decoder

PROMPT, NEW = [5, 6, 7, 8], 20


@pytest.fixture(params=["reference", "cpu"])
def ops(request):
    return backend(request.param)


def decoder_of(folder, ops) -> Decoder:
    return Decoder(*load_weights(open_checkpoint(folder), ops=ops, dtype="fp32"), ops)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_our_loop_writes_what_hugging_face_writes(make_checkpoint, family, ops):
    folder = make_checkpoint(family)
    expected = greedy(HuggingFace(load_hugging_face(folder, torch.float32)), PROMPT, NEW)
    decoder = decoder_of(folder, ops)
    for mode in ("dense", "exact"):
        ours = Dejavu(decoder, 32, mode)
        for _ in range(2):  # a second prompt starts afresh
            assert greedy(ours, PROMPT, NEW) == expected


def test_bytes_are_those_of_the_steps(make_checkpoint, ops):
    decoder = decoder_of(make_checkpoint("opt"), ops)
    dense, exact = (Dejavu(decoder, 32, mode) for mode in ("dense", "exact"))
    for peer in (dense, exact):
        assert len(decode_times(peer, PROMPT, 6, skip=2).steps_s) == 6
    # Eight steps attend to 5, 6, ... 12 tokens.
    assert dense.bytes_per_token() == step_bytes(decoder.config, decoder.weights, attended=8.5)
    assert dense.mlp_density() == 1
    density, skipped = exact.mlp_density(), exact.bytes_per_token()
    assert 0 < density < 1
    rows = decoder.config.num_hidden_layers * decoder.config.intermediate_size * decoder.config.hidden_size * 4
    saved = dense.bytes_per_token()["mlp_out"] - skipped["mlp_out"]
    assert saved == pytest.approx((1 - density) * rows)
    assert skipped | {"mlp_out": 0} == dense.bytes_per_token() | {"mlp_out": 0}


def test_first_steps_are_left_out():
    class Counter:
        def prefill(self, ids):
            self.tokens = list(ids)
            return 10

        def step(self, token):
            self.tokens.append(token)
            return token + 1

    counter = Counter()
    times = decode_times(counter, [1, 2], 3, skip=2).steps_s
    assert counter.tokens == [1, 2, 10, 11, 12, 13, 14]
    assert len(times) == 3
    assert all(t >= 0 for t in times)
    assert greedy(counter, [1, 2], 4) == [10, 11, 12, 13]


def test_common_prefix_and_random_prompt():
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([], [1]) == 0
    ids = random_prompt(50, 1000, seed=1)
    assert (len(ids), min(ids), max(ids)) == (1000, 0, 49)
    assert ids == random_prompt(50, 1000, seed=1) != random_prompt(50, 1000, seed=2)
