"""Named shapes have their published sizes; random weights are finite, repeatable and as dense as asked for."""

import pytest
import torch

from dejavu.bench.decode import Dejavu, greedy
from dejavu.bench.shapes import SHAPES, parse, random_weights, shape
from dejavu.checkpoint.layout import allocate
from dejavu.errors import ConfigError
from dejavu.kernels import backend
from dejavu.model.decoder import Decoder

# Published parameter counts, in millions: arXiv 2205.01068 (Table 1), and Llama 2's model card.
PUBLISHED = {
    "opt-125m": 125, "opt-350m": 331, "opt-1.3b": 1316, "opt-2.7b": 2652, "opt-6.7b": 6658, "opt-13b": 12853,
    "opt-30b": 29974, "opt-66b": 65719, "opt-175b": 174600, "llama-2-7b-relu": 6738,
}  # fmt: skip
SMALL = {"opt-125m": {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024},
         "opt-350m": {"hidden_size": 256, "word_embed_proj_dim": 128, "ffn_dim": 1024},
         "llama-2-7b-relu": {"hidden_size": 256, "intermediate_size": 768}}  # fmt: skip
SMALLER = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 500}


def small(name):
    return parse(SHAPES[name] | SMALL[name] | SMALLER)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_its_published_size(name):
    sizes = []
    allocate(parse(shape(name)), torch.bfloat16, lambda shape, dtype: sizes.append(torch.Size(shape).numel()))
    # The first of OPT's and of Llama's tables is embed; the head is counted with it where they are tied.
    assert sum(sizes) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("shape_name", SMALL)
def test_random_weights_keep_activations_finite(name, shape_name):
    config, ops = small(shape_name), backend(name)
    decoder = Decoder(config, random_weights(config, torch.bfloat16, ops), ops)
    cache = decoder.new_cache(1, 64)
    logits = decoder.prefill(torch.arange(64), cache, all_logits=True)
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10  # near unit size


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("shape_name", ["opt-125m", "opt-350m"])
def test_the_density_is_about_that_asked_for(shape_name, density):
    config, ops = small(shape_name), backend("reference")
    weights = random_weights(config, torch.float32, ops, mlp_density=density)
    ours = Dejavu(Decoder(config, weights, ops), 32, "exact")
    greedy(ours, [1, 2, 3], 20)
    # 3 layers of 1,024 neurons over 19 tokens that resemble each other: a standard deviation of about 0.01.
    assert ours.mlp_density() == pytest.approx(density, abs=0.04)


def test_weights_are_those_of_the_seed_and_no_two_rows_are_alike():
    config, ops = small("opt-125m"), backend("reference")
    a, b, other = (random_weights(config, torch.bfloat16, ops, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x.mlp.rows, y.mlp.rows) for x, y in zip(a.layers, b.layers, strict=True))
    assert not torch.equal(a.embed, other.embed)
    rows = torch.cat([t.view(-1, 256) for layer in a.layers for t in (layer.mlp.rows, layer.attn.blocks)])
    assert rows.unique(dim=0).shape == rows.shape
    assert rows.float().std() == pytest.approx(256**-0.5, rel=0.02)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"'opt-7b' does not exist; choose one of: opt-125m, "):
        shape("opt-7b")
    with pytest.raises(ConfigError, match="between 0 and 1, found 0"):
        random_weights(small("opt-125m"), torch.float32, backend("reference"), mlp_density=0)
    with pytest.raises(ConfigError, match="needs an MLP with a bias"):
        random_weights(small("llama-2-7b-relu"), torch.float32, backend("reference"), mlp_density=0.1)
