"""Prompts in products of the weights' own width: near float32, on machines that have them and on those that do not."""

import pytest
import torch

import dejavu
from dejavu.bench.peers.hugging_face import load_hugging_face
from dejavu.checkpoint.source import open_checkpoint
from dejavu.kernels import base

TEXT = "The river rises in the hills to the north of the town and flows south for about forty miles."


@pytest.fixture(params=[None, "int8", "int4"])
def engine(request):
    return dejavu.load("opt-mini", dtype="bf16", weights=request.param)


@pytest.fixture(params=[True, False], ids=["bf16", "float32"])
def multiplies(request, monkeypatch):
    monkeypatch.setattr(base, "multiplies_bf16", lambda: request.param)
    return request.param


def logits(engine, **how):
    decoder, ids = engine.decoder, torch.tensor(engine.tokenizer.encode(TEXT))
    # The decoder is made anew: it asks at its making what this machine multiplies.
    decoder = type(decoder)(decoder.config, decoder.weights, decoder.ops)
    return decoder.prefill(ids, decoder.new_cache(1, len(ids)), all_logits=True, **how)


def test_narrow_products_are_near_those_in_float32(engine, multiplies):
    wide, narrow = logits(engine), logits(engine, narrow=True)
    away = (wide - narrow).abs().max() / wide.std()
    assert away < 0.15  # activations of 8 significant bits, eight layers of them
    assert (away > 1e-4) == multiplies, "one of the two did not happen"


def test_narrow_products_err_no_more_than_hugging_face(multiplies):
    engine = dejavu.load("opt-mini", dtype="bf16")
    theirs = load_hugging_face(open_checkpoint("opt-mini").path, torch.bfloat16)
    ids = torch.tensor([engine.tokenizer.encode(TEXT)])
    with torch.inference_mode():
        rounded = theirs(ids).logits[0].float()
        exact = theirs.float()(ids).logits[0]  # of the same weights, rounded to bf16
    error = (logits(engine, narrow=True) - exact).square().mean()
    assert error <= (rounded - exact).square().mean()


def test_a_prompt_in_pieces_or_beside_others_is_near_itself_alone(engine, multiplies):
    decoder = type(engine.decoder)(engine.config, engine.decoder.weights, engine.decoder.ops)
    ids = torch.tensor(engine.tokenizer.encode(TEXT))
    alone, beside = decoder.new_cache(1, 64), decoder.new_cache(3, 64)
    whole = decoder.prefill(ids, alone, narrow=True)
    decoder.forward([ids[:9], ids[:3]], beside, [2, 0], narrow=True)
    pieces = decoder.prefill(ids[9:], beside, 2, narrow=True)
    assert (whole - pieces).abs().max() / whole.std() < 0.15
