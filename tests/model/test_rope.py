"""Tables of every rotary kind against Hugging Face's own module, and the reading of config.json."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dejavu.errors import CheckpointError
from dejavu.model.rope import KINDS, parse_rope, rope_table

HEAD_DIM, CONTEXT = 32, 128
SHORT, LONG = [1.0 + i / 8 for i in range(HEAD_DIM // 2)], [2.0 + i for i in range(HEAD_DIM // 2)]
ORIGINAL = {"original_max_position_embeddings": 32}

# Parameters of each kind, and lengths on every side of the borders at which its frequencies change.
CASES = {
    "default": ({}, (1, 300)),
    "linear": ({"rope_type": "linear", "factor": 3.0}, (300,)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, (100, 128, 129, 300)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
        (300,),
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0} | ORIGINAL, (300,)),
    "yarn, every parameter": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.8,
         "mscale_all_dim": 0.5} | ORIGINAL,
        (300,),
    ),
    "yarn, given attention": ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5} | ORIGINAL, (300,)),
    "longrope": ({"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG} | ORIGINAL, (31, 32, 33, 300)),
    "longrope, given factor": (
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 8.0} | ORIGINAL,
        (20, 300),
    ),
}  # fmt: skip
LENGTHS = [(name, length) for name, (_, lengths) in CASES.items() for length in lengths]


def test_every_kind_has_a_case():
    assert {params.get("rope_type", "default") for params, _ in CASES.values()} == set(KINDS)


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_table_equals_hugging_face(name, length):
    params = CASES[name][0] | {"rope_theta": 500.0}
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM, num_attention_heads=2, max_position_embeddings=CONTEXT, rope_parameters=dict(params)
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    rope = parse_rope({"rope_parameters": params}, HEAD_DIM, CONTEXT)
    table = rope_table(rope, HEAD_DIM, length, CONTEXT)
    assert table.shape == (length, HEAD_DIM) and table.dtype == torch.float32
    expected = torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)
    # A frequency may differ in its last bit, which position 300 multiplies.
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_older_configs_say_the_same(name, type_key):
    params = dict(CASES[name][0])
    new = parse_rope({"rope_parameters": params | {"rope_theta": 500.0}}, HEAD_DIM, CONTEXT)
    if "rope_type" in params:
        params[type_key] = params.pop("rope_type")
    old = parse_rope({"rope_theta": 500.0, "rope_scaling": params or None}, HEAD_DIM, CONTEXT)
    assert (old.theta, old.kind) == (new.theta, new.kind) == (500.0, CASES[name][0].get("rope_type", "default"))
    assert torch.equal(rope_table(old, HEAD_DIM, 300, CONTEXT), rope_table(new, HEAD_DIM, 300, CONTEXT))


def test_defaults():
    assert parse_rope({}, HEAD_DIM, CONTEXT).theta == 10_000.0
    # The original context stands beside the parameters (and is then believed), in them, or is the context itself.
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for config, original in [
        ({"rope_scaling": yarn}, CONTEXT),
        ({"rope_scaling": yarn | ORIGINAL}, 32),
        ({"rope_scaling": yarn | ORIGINAL, "original_max_position_embeddings": 64}, 64),
    ]:
        assert parse_rope(config, HEAD_DIM, CONTEXT).scaling["original_max_position_embeddings"] == original


@pytest.mark.parametrize(
    ("config", "head_dim", "message"),
    [
        ({"rope_scaling": {"type": "mrope"}}, 32, "'mrope' is not supported; supported: default, linear, dynamic"),
        ({"rope_scaling": {"type": "linear"}}, 32, "factor must be a number, found None"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 32, "factor must be a number, found '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, 32, "factor must be a number in"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}}, 32, "no finite angles"),
        ({"rope_scaling": [1]}, 32, "must be an object"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG[1:]}}, 32, "16 numbers"),
        ({"rope_theta": "big"}, 32, "rope_theta must be a number"),
        ({"partial_rotary_factor": 0.5}, 32, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, 32, "partial_rotary_factor 0.5"),
        ({}, 33, "head_dim 33"),
    ],
)
def test_senseless_parameters_are_named(config, head_dim, message):
    with pytest.raises(CheckpointError, match=message):
        parse_rope(config, head_dim, CONTEXT)
