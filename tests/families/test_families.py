"""Every family and variant against Hugging Face's eager float32 logits, on tiny random models."""

import copy
import json
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dejavu.checkpoint.layout import allocate
from dejavu.families import family
from dejavu.kernels import backend
from dejavu.kernels.reference import Tokens
from dejavu.model import decoder
from dejavu.model.counts import Counts
from dejavu.model.decoder import Decoder

TOKENS, CHUNK, WINDOW = 23, 7, 6
FAT_THRESHOLD = 0.3

OPT = {"vocab_size": 61, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 90, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip
LLAMA = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 90, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32,
         "hidden_act": "relu"}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 90, "n_positions": 32}
GROUPED = {"num_key_value_heads": 2}
ORIGINAL = {"original_max_position_embeddings": 8}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}

# name -> (model_type, what differs from the sizes above)
VARIANTS = {
    "opt": ("opt", {}),
    "opt post-norm projected": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "opt without norm weights": ("opt", {"layer_norm_elementwise_affine": False}),
    "opt without final norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
    "opt gelu": ("opt", {"activation_function": "gelu"}),
    "llama": ("llama", {}),
    "llama grouped": ("llama", GROUPED),
    "llama one key head": ("llama", {"num_key_value_heads": 1}),
    "llama head_dim": ("llama", GROUPED | {"head_dim": 12}),
    "llama attention_bias": ("llama", GROUPED | {"attention_bias": True}),
    "llama mlp_bias": ("llama", {"mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama silu": ("llama", {"hidden_act": "silu"}),
    "llama gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama fatrelu": ("llama", {"hidden_act": "fatrelu", "hidden_act_param": FAT_THRESHOLD, "mlp_bias": True}),
    "prosparse": ("sparsellama", {"hidden_act": "fatrelu", "hidden_act_param": FAT_THRESHOLD}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0} | ORIGINAL}),
    "llama3": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
         | ORIGINAL},
    ),
    "longrope long": ("llama", {"rope_parameters": {"rope_type": "longrope", **FACTORS, **ORIGINAL}}),
    "longrope short": ("llama", {"rope_parameters": {"rope_type": "longrope", **FACTORS}}),
    "mistral": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "mistral without window": ("mistral", GROUPED | {"sliding_window": None, "hidden_act": "silu"}),
    "bamboo": ("bamboo", GROUPED | {"sliding_window": WINDOW}),
    "gpt2": ("gpt2", {}),
    "gpt2 relu": ("gpt2", {"activation_function": "relu", "n_inner": None, "tie_word_embeddings": False}),
}  # fmt: skip
SMOOTH = ["gpt2", "opt gelu", "llama silu", "llama gelu", "mistral without window"]
ZEROING = [name for name in VARIANTS if name not in SMOOTH]
# Architectures that Hugging Face does not carry: the one it is built from, whose MLP is then changed.
PARENTS = {"sparsellama": "llama", "bamboo": "mistral"}


@cache
def reference(name: str) -> tuple[nn.Module, dict]:
    """The Hugging Face model of a variant, its weights rounded to bfloat16, and the config.json it would save."""
    model_type, sizes = VARIANTS[name]
    sizes = {"opt": OPT, "gpt2": GPT2}.get(model_type, LLAMA) | sizes
    act = {"hidden_act": "relu"} if sizes.get("hidden_act") == "fatrelu" else {}
    config = AutoConfig.for_model(PARENTS.get(model_type, model_type), **sizes | act)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        # Large enough that every term of every layer moves the logits; norms stay near one.
        matrix = parameter.dim() == 2 and not any(name in key for name in ("embed", "wte", "wpe"))
        spread = 1.5 * parameter.shape[1] ** -0.5 if matrix else 0.4
        norm = key.endswith("weight") and ("norm" in key or ".ln_" in key)
        nn.init.normal_(parameter, 1.0 if norm else 0.0, spread)
        parameter.copy_(parameter.bfloat16())
    for layer in model.model.layers if model_type not in ("opt", "gpt2") else ():
        if act:
            layer.mlp.act_fn = nn.Threshold(FAT_THRESHOLD, 0.0)
        if model_type == "bamboo":
            layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj, nn.ReLU())
    saved = json.loads(config.to_json_string()) | {"model_type": model_type}
    return model, saved | {k: sizes[k] for k in ("hidden_act", "hidden_act_param") if k in sizes}


@cache
def tokens_and_logits(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts (2, TOKENS), and Hugging Face's float32 logits of every position."""
    model, _ = reference(name)
    tokens = torch.randint(0, 61, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return tokens, model(tokens).logits


@pytest.fixture(params=["reference", "cpu"])
def ops(request):
    return backend(request.param)


def build(name: str, ops, dtype: torch.dtype = torch.float32) -> Decoder:
    """The variant's weights in our decoder: every slot filled, every tensor used."""
    model, saved = reference(name)
    module = family(saved["model_type"])
    config = module.parse(saved)
    weights = allocate(config, dtype, ops.empty)
    slots = module.slots(config, weights)
    tensors = {key.replace("up_proj.0.", "up_proj."): tensor for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for key, tensor in tensors.items():
        slot = slots.pop(key.removeprefix("model.").removeprefix("transformer."))
        assert slot.shape == tuple(tensor.shape), key
        slot.fill(tensor)
    assert not slots
    return Decoder(config, weights, ops)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor):
    # Summation order alone differs; the bound is relative to the largest logit.
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def decode(model: Decoder, tokens: torch.Tensor, prefilled: int, cache, mode: str = "dense", counts=None):
    """Row 0 from its first token, row 1 from behind a prefill: (step, row, V) logits of a ragged batch."""
    model.prefill(tokens[1, :prefilled], cache, row=1)
    out = []
    for t in range(TOKENS - prefilled):
        positions = torch.tensor([t, prefilled + t], dtype=torch.int32)
        ids = tokens[torch.arange(2), positions].int()
        out.append(model.step(Tokens.one_a_row(positions, ids), cache, mode=mode, counts=counts))
    return torch.stack(out)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_equals_hugging_face(name, ops, monkeypatch):
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", CHUNK)
    tokens, logits = tokens_and_logits(name)
    model = build(name, ops)
    cache = model.new_cache(2, TOKENS)
    for row in (0, 1):
        assert_equal(model.prefill(tokens[row], cache, row, all_logits=True), logits[row])
        cache.truncate(row, 0)
        assert_equal(model.prefill(tokens[row], cache, row), logits[row, -1])


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_equals_teacher_forced_hugging_face(name, ops, monkeypatch):
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", CHUNK)
    tokens, logits = tokens_and_logits(name)
    model = build(name, ops)
    for prefilled in (1, 9):  # a token, and more than a chunk
        ours = decode(model, tokens, prefilled, model.new_cache(2, TOKENS))
        steps = TOKENS - prefilled
        assert_equal(ours, torch.stack((logits[0, :steps], logits[1, prefilled:]), 1))


@pytest.mark.parametrize("name", ZEROING)
def test_exact_equals_dense_and_reads_less(name, ops):
    tokens, _ = tokens_and_logits(name)
    model = build(name, ops)
    assert "exact" in model.config.modes
    results = {}
    for mode in ("dense", "exact"):
        counts = Counts(model.config, model.device)
        results[mode] = decode(model, tokens, 9, model.new_cache(2, TOKENS), mode, counts)
        rows = counts.rows_read
        everything = (TOKENS - 9) * model.config.intermediate_size
        assert (rows[:, 0] == everything).all()
        assert (rows[:, 1:] == everything).all() if mode == "dense" else (rows[:, 1:] < everything).all()
    assert torch.equal(results["exact"], results["dense"])


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_have_no_exact_mode(name):
    _, saved = reference(name)
    assert "exact" not in family(saved["model_type"]).parse(saved).modes


@pytest.mark.parametrize("name", ["opt", "opt post-norm projected", "llama grouped", "mistral", "bamboo"])
def test_bfloat16_is_as_good_as_hugging_face(name, ops):
    tokens, logits = tokens_and_logits(name)
    theirs = copy.deepcopy(reference(name)[0]).bfloat16()(tokens).logits.float()
    model = build(name, ops, torch.bfloat16)
    cache = model.new_cache(2, TOKENS)
    prefill = torch.stack([model.prefill(tokens[row], cache, row, all_logits=True) for row in (0, 1)])
    steps = decode(model, tokens, 9, model.new_cache(2, TOKENS))
    bound = 2 * (theirs - logits).abs().max()
    assert (prefill - logits).abs().max() <= bound
    assert (steps - torch.stack((logits[0, : TOKENS - 9], logits[1, 9:]), 1)).abs().max() <= bound
