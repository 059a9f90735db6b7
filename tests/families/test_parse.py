"""Published config.json files become the right architectures, and wrong ones clear errors."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dejavu.checkpoint.layout import allocate
from dejavu.errors import CheckpointError, ConfigError
from dejavu.families import family

# hidden_size, layers, heads, ffn_dim and parameters of every published OPT
OPT_SIZES = {
    "125m": (768, 12, 12, 3072, 125_239_296),
    "350m": (1024, 24, 16, 4096, 331_196_416),
    "1.3b": (2048, 24, 32, 8192, 1_315_758_080),
    "2.7b": (2560, 32, 32, 10240, 2_651_596_800),
    "6.7b": (4096, 32, 32, 16384, 6_658_473_984),
    "13b": (5120, 40, 40, 20480, 12_853_473_280),
    "30b": (7168, 48, 56, 28672, 29_974_540_288),
    "66b": (9216, 64, 72, 36864, 65_719_701_504),
}
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 2, "num_attention_heads": 32, "max_position_embeddings": 4096, "hidden_act": "relu",
    "rms_norm_eps": 1e-05, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TURBOSPARSE = LLAMA | {
    "model_type": "bamboo", "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
    "max_position_embeddings": 32768, "vocab_size": 32064, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def opt_config(size: str) -> dict:
    hidden, layers, heads, ffn, _ = OPT_SIZES[size]
    return {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": hidden, "ffn_dim": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 2048, "activation_function": "relu",
        "word_embed_proj_dim": 512 if size == "350m" else hidden, "do_layer_norm_before": size != "350m",
        "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """What our loader expects of a checkpoint."""
    module = family(config["model_type"])
    parsed = module.parse(config)
    weights = allocate(parsed, torch.bfloat16, meta)
    return {name: slot.shape for name, slot in module.slots(parsed, weights).items()}


@pytest.mark.parametrize("size", OPT_SIZES)
def test_published_opt_sizes(size):
    config = opt_config(size)
    parsed = family("opt").parse(config)
    assert parsed.norm_before == parsed.final_norm == (size != "350m") and "exact" in parsed.modes
    assert parsed.head_dim in (64, 80, 128) and parsed.eos_token_ids == (2,)

    expected = shapes(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.tie_weights()  # transformers 5.0 leaves it undone on the meta device
    theirs = {name.removeprefix("model."): tuple(p.shape) for name, p in model.named_parameters()}
    assert expected == theirs
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == OPT_SIZES[size][-1]


def test_prosparse():
    fatrelu = {"hidden_act": "fatrelu", "hidden_act_param": 0.01, "pretraining_tp": 1}
    parsed = family("sparsellama").parse(LLAMA | {"model_type": "sparsellama"} | fatrelu)
    assert (parsed.activation, parsed.activation_threshold) == ("fatrelu", 0.01)
    assert parsed.gated and not parsed.activate_up and not parsed.tie_word_embeddings
    assert parsed.num_key_value_heads == 32 and parsed.head_dim == 128
    assert "exact" in parsed.modes


def test_turbosparse_and_its_predictors():
    module = family("bamboo")
    parsed = module.parse(TURBOSPARSE)
    assert parsed.activate_up and parsed.activation == "relu" and parsed.sliding_window == 4096
    assert parsed.num_key_value_heads == 8 and parsed.rope.theta == 10_000.0
    assert any(re.search(pattern, "model.layers.0.mlp.predictor.fc1.weight") for pattern in module.IGNORED)
    assert not any(re.search(pattern, name) for pattern in module.IGNORED for name in shapes(TURBOSPARSE))


def test_mistral_is_not_bamboo():
    parsed = family("mistral").parse(TURBOSPARSE | {"model_type": "mistral", "sliding_window": None})
    assert not parsed.activate_up and parsed.sliding_window is None
    without = {key: value for key, value in TURBOSPARSE.items() if key != "sliding_window"}
    assert family("mistral").parse(without).sliding_window == 4096  # as Hugging Face


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"model_type": "gpt3"}, "'gpt3' is not supported; supported: bamboo, gpt2, llama, mistral, opt"),
        (LLAMA | {"model_type": None}, "model_type None is not supported"),
        (LLAMA | {"hidden_act": "shiftrelu"}, "hidden_act 'shiftrelu' is not supported; supported: relu, fatrelu"),
        (LLAMA | {"hidden_act": "fatrelu"}, "hidden_act_param must be a number"),
        (LLAMA | {"num_attention_heads": 30}, "hidden_size .4096. must be a multiple of num_attention_heads .30."),
        (LLAMA | {"num_attention_heads": 0, "head_dim": 128}, "num_attention_heads must be a positive integer"),
        (LLAMA | {"num_key_value_heads": 5}, "must be a multiple of num_key_value_heads"),
        (LLAMA | {"hidden_size": "4096"}, "hidden_size must be an integer, found '4096'"),
        (LLAMA | {"rope_scaling": {"type": "su"}}, "rope_type 'su' is not supported"),
        (LLAMA | {"attention_bias": 1}, "attention_bias must be true or false"),
        (opt_config("125m") | {"ffn_dim": None}, "ffn_dim must be an integer, found None"),
        (opt_config("125m") | {"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
        (opt_config("125m") | {"num_attention_heads": 7}, "must be a multiple of num_attention_heads"),
        (TURBOSPARSE | {"sliding_window": "long"}, "sliding_window must be an integer"),
    ],
)
def test_wrong_configs_are_named(config, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        family(config["model_type"]).parse(config)
