"""The decode step: replaying equals calling, and decoding equals reading the whole text at once."""

import pytest
import torch

import dejavu
from dejavu.engine.step import DecodeStep

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
    graph, plain = (DecodeStep(decoder, 1, len(IDS), mode) for _ in range(2))
    plain._graph = None
    assert graph._graph is not None
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
