"""Checkpoints arrive in the kernel layout whole and unchanged, or not at all."""

import itertools
import json
import math
import random
from dataclasses import is_dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dejavu.artifacts import new_folder
from dejavu.checkpoint import source
from dejavu.checkpoint.layout import parse_quantization
from dejavu.checkpoint.load import NAMES_SHOWN
from dejavu.checkpoint.saved import save_quantized
from dejavu.checkpoint.source import open_checkpoint
from dejavu.device import warn_once
from dejavu.errors import CheckpointError, ConfigError, DejavuError, KernelUnavailable
from dejavu.families.load import load_weights
from dejavu.kernels import backend
from dejavu.model.decoder import Decoder

OPS = backend("reference")
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}


def load(folder, **options):
    return load_weights(open_checkpoint(folder), **{"ops": OPS, **options})


def state(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def rewrite(folder, change):
    """Change the tensors of a single-file checkpoint: `change(dict)` in place."""
    # Copies, because the loaded tensors are views of the very file that is about to be replaced.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def flat(weights):
    """Every tensor of a layout, in one fixed order."""
    out = []

    def walk(part):
        for value in vars(part).values():
            if isinstance(value, torch.Tensor):
                out.append(value)
            for item in value if isinstance(value, list) else [value]:
                if is_dataclass(item):
                    walk(item)

    walk(weights)
    return out


def same(a, b):
    if (a.dtype, a.quantization) != (b.dtype, b.quantization):
        return False
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


# The layouts


@pytest.mark.parametrize("tiny_pieces", [False, True])
@pytest.mark.parametrize("overrides", [{}, OPT_350M], ids=["pre-norm", "350m"])
def test_opt_layout_holds_the_tensors(make_checkpoint, monkeypatch, overrides, tiny_pieces):
    if tiny_pieces:
        monkeypatch.setattr(source, "PIECE_BYTES", 100)
        monkeypatch.setattr(source, "REMAP_BYTES", 1)
    folder = make_checkpoint("opt", **overrides)
    t = {name.removeprefix("model.decoder."): x for name, x in state(folder).items()}
    config, w = load(folder)
    H, D, C = config.num_attention_heads, config.head_dim, config.hidden_size
    assert w.head is w.embed
    assert torch.equal(w.embed, t["embed_tokens.weight"])
    assert torch.equal(w.position_table, t["embed_positions.weight"])
    if overrides:
        assert torch.equal(w.project_in, t["project_in.weight"])
        assert torch.equal(w.project_out, t["project_out.weight"])
    else:
        assert torch.equal(w.final_norm.bias, t["final_layer_norm.bias"])
    for i, layer in enumerate(w.layers):
        at = f"layers.{i}."
        assert torch.equal(layer.attn_norm.weight, t[at + "self_attn_layer_norm.weight"])
        assert torch.equal(layer.mlp_norm.bias, t[at + "final_layer_norm.bias"])
        assert torch.equal(layer.mlp.rows[:, 0], t[at + "fc1.weight"])
        assert torch.equal(layer.mlp.rows[:, 1], t[at + "fc2.weight"].T)
        assert torch.equal(layer.mlp.in_bias, t[at + "fc1.bias"])
        assert torch.equal(layer.mlp.out_bias, t[at + "fc2.bias"])
        assert torch.equal(layer.attn.out_bias, t[at + "self_attn.out_proj.bias"])
        for j, part in enumerate("qkv"):
            weight, bias = (t[at + f"self_attn.{part}_proj.{kind}"] for kind in ("weight", "bias"))
            assert torch.equal(layer.attn.blocks[:, j], weight.view(H, D, C))
            assert torch.equal(layer.attn.qkv_bias[:, j], bias.view(H, D))
        out = t[at + "self_attn.out_proj.weight"]
        for h in range(H):
            assert torch.equal(layer.attn.blocks[h, 3], out[:, h * D : (h + 1) * D].T)


@pytest.mark.parametrize("tiny_pieces", [False, True])
def test_grouped_and_gated_layout_holds_the_tensors(make_checkpoint, monkeypatch, tiny_pieces):
    if tiny_pieces:
        monkeypatch.setattr(source, "PIECE_BYTES", 100)
        monkeypatch.setattr(source, "REMAP_BYTES", 1)
    folder = make_checkpoint("llama", attention_bias=True, mlp_bias=True)
    t = {name.removeprefix("model."): x for name, x in state(folder).items()}
    config, w = load(folder)
    D, r = config.head_dim, config.heads_per_group
    assert r == 2
    assert torch.equal(w.head, t["lm_head.weight"]) and not torch.equal(w.head, w.embed)
    for i, layer in enumerate(w.layers):
        attn, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        for h in range(config.num_attention_heads):
            g, j, rows = h // r, h % r, slice(h * D, (h + 1) * D)
            assert torch.equal(layer.attn.blocks[g, j], t[attn + "q_proj.weight"][rows])
            assert torch.equal(layer.attn.qkv_bias[g, j], t[attn + "q_proj.bias"][rows])
            assert torch.equal(layer.attn.blocks[g, r + 2 + j], t[attn + "o_proj.weight"][:, rows].T)
        for g in range(config.num_key_value_heads):
            rows = slice(g * D, (g + 1) * D)
            for j, part in enumerate("kv"):
                assert torch.equal(layer.attn.blocks[g, r + j], t[attn + f"{part}_proj.weight"][rows])
                assert torch.equal(layer.attn.qkv_bias[g, r + j], t[attn + f"{part}_proj.bias"][rows])
        for j, part in enumerate(("gate", "up")):
            assert torch.equal(layer.mlp.rows[:, j], t[mlp + f"{part}_proj.weight"])
            assert torch.equal(layer.mlp.in_bias[:, j], t[mlp + f"{part}_proj.bias"])
        assert torch.equal(layer.mlp.rows[:, 2], t[mlp + "down_proj.weight"].T)
        assert torch.equal(layer.mlp.out_bias, t[mlp + "down_proj.bias"])


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_sharded_and_bin_equal_one_safetensors_file(make_checkpoint, tmp_path, model_type):
    single, sharded = make_checkpoint(model_type), make_checkpoint(model_type, max_shard_size="30KB")
    assert len(list(single.glob("*.safetensors"))) == 1 and len(list(sharded.glob("*.safetensors"))) > 2
    torch.save(state(single), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((single / "config.json").read_text())
    config, expected = load(single)
    for folder in (sharded, tmp_path):
        assert load(folder)[0] == config
        assert same(load(folder)[1], expected)


def test_names_without_prefix_and_a_stored_tied_head_and_buffers(make_checkpoint):
    folder = make_checkpoint("opt")
    expected = load(folder)[1]

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"].clone()
        tensors["decoder.version"] = torch.tensor([3])

    assert same(load(rewrite(folder, change))[1], expected)


def test_progress_counts_every_byte(make_checkpoint):
    folder, calls = make_checkpoint("opt"), []
    load(folder, progress=lambda what, done, total: calls.append((done, total)))
    total = sum(t.nbytes for t in state(folder).values())
    assert {t for _, t in calls} == {total} and calls[-1][0] == total
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(calls))


# Data types


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
def test_dtypes(make_checkpoint, stored, asked):
    folder = make_checkpoint("opt", dtype=stored)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(asked) or (
        torch.bfloat16 if stored == torch.float16 else stored
    )
    _, w = load(folder, dtype=asked)
    t = state(folder)
    layer, at = w.layers[1], "model.decoder.layers.1."
    assert w.dtype == layer.mlp.rows.dtype == layer.attn.blocks.dtype == w.position_table.dtype == expected
    assert torch.equal(layer.mlp.rows[:, 1], t[at + "fc2.weight"].T.to(expected))
    for mine, name in ((layer.mlp.in_bias, "fc1.bias"), (layer.mlp_norm.weight, "final_layer_norm.weight")):
        assert mine.dtype == torch.float32 and torch.equal(mine, t[at + name].float())


def test_auto_follows_most_of_the_bytes(make_checkpoint):
    def change(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    assert load(rewrite(make_checkpoint("opt"), change))[1].dtype == torch.bfloat16


def test_explicit_dtypes_work_or_raise(make_checkpoint):
    folder = make_checkpoint("opt")
    with pytest.raises(KernelUnavailable, match="fp16"):
        load(folder, dtype="fp16")
    with pytest.raises(ConfigError, match="int8"):
        load(folder, dtype="int8")


# Bad checkpoints: one error each, before any memory is taken.


@pytest.fixture
def refuse():
    """Load a bad folder; return the one-line message of its CheckpointError."""

    def empty(shape, dtype):
        raise AssertionError("memory was taken before the checks were done")

    def refuse(folder) -> str:
        with pytest.raises(CheckpointError) as error:
            load(folder, ops=SimpleNamespace(empty=empty, device=torch.device("cpu")))
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


def test_every_bad_tensor_is_listed_at_once(make_checkpoint, refuse):
    def change(tensors):
        at = "model.decoder.layers.0."
        tensors["model.decoder.layers.0.fcone.weight"] = tensors.pop(at + "fc1.weight")
        tensors[at + "fc2.weight"] = tensors[at + "fc2.weight"].T.contiguous()
        tensors[at + "self_attn.q_proj.weight"] = tensors[at + "self_attn.q_proj.weight"].to(torch.int8)
        tensors[at + "self_attn.k_proj.weight"] = tensors[at + "self_attn.k_proj.weight"].to(torch.float8_e4m3fn)
        del tensors["model.decoder.embed_tokens.weight"]

    message = refuse(rewrite(make_checkpoint("opt"), change))
    for part in (
        "2 missing: decoder.embed_tokens.weight (101, 36), decoder.layers.0.fc1.weight (50, 36)",
        "1 unexpected: model.decoder.layers.0.fcone.weight",
        "1 wrongly shaped: model.decoder.layers.0.fc2.weight (expected (36, 50), found (50, 36))",
        "self_attn.q_proj.weight (found I8)",
        "self_attn.k_proj.weight (found F8_E4M3)",
        "supported: float32, bfloat16, float16",
    ):
        assert part in message


def test_long_lists_are_cut(make_checkpoint, refuse):
    message = refuse(edit_config(make_checkpoint("opt"), num_hidden_layers=9))
    assert f"{7 * 16} missing" in message and f"and {7 * 16 - NAMES_SHOWN} more" in message


def test_a_tensor_given_twice_is_unexpected(make_checkpoint, refuse):
    def change(tensors):
        tensors["decoder.embed_tokens.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()

    assert "1 unexpected" in refuse(rewrite(make_checkpoint("opt"), change))


def test_an_untied_model_needs_its_head(make_checkpoint, refuse):
    assert "1 missing: lm_head.weight" in refuse(edit_config(make_checkpoint("opt"), tie_word_embeddings=False))


def test_a_checkpoint_cut_in_half(make_checkpoint, refuse):
    folder = make_checkpoint("opt")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{file}: damaged or cut off" in refuse(folder)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"model_type": "bert"}, ("'bert'", "llama", "opt")),
        ({"model_type": None}, ("None", "opt")),
        ({"model_type": ["opt"]}, ("['opt']", "opt")),
        ({"activation_function": "tanh"}, ("'tanh'", "relu")),
        ({"activation_function": ["relu"]}, ("['relu']", "relu")),
        ({"hidden_size": 72}, ("wrongly shaped", "project_in")),
    ],
)
def test_an_unsupported_or_contradicting_config(make_checkpoint, refuse, fields, parts):
    message = refuse(edit_config(make_checkpoint("opt"), **fields))
    assert all(part in message for part in parts)


SIZES = {
    *("vocab_size", "hidden_size", "ffn_dim", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "word_embed_proj_dim", "head_dim"),
}


@pytest.mark.parametrize("model_type", ["opt", "llama"])
@pytest.mark.parametrize("value", [0, -1, 7, 1.5, "x", [], {}, True, 2**70])
def test_no_value_of_a_size_ends_in_another_kind_of_error(make_checkpoint, model_type, value):
    folder = make_checkpoint(model_type)
    good = (folder / "config.json").read_text()
    # Rotary positions have no tensor, so any positive number of them is right.
    free = {"max_position_embeddings"} if model_type == "llama" and value in (7, 2**70) else set()
    for name in SIZES & set(json.loads(good)) - free:
        (folder / "config.json").write_text(good)
        with pytest.raises(DejavuError) as error:
            load(edit_config(folder, **{name: value}))
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_a_head_of_its_own_is_used_though_config_json_ties_it(make_checkpoint, model_type, caplog, tmp_path):
    """As transformers does. The folder that is saved quantised keeps it too."""
    folder = make_checkpoint(model_type, tie_word_embeddings=True)
    warn_once.cache_clear()

    def change(tensors):
        (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = tensors[name].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    rewrite(folder, change)
    config, weights = load(folder)
    assert not config.tie_word_embeddings and torch.equal(weights.head, state(folder)["lm_head.weight"])
    assert "lm_head.weight has values of its own; they are used" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Decoder(config, weights, OPS)
    logits = ours.prefill(ids[0], ours.new_cache(1, 3), all_logits=True)
    torch.testing.assert_close(logits, theirs(ids).logits[0], rtol=0, atol=1e-4)
    quantised = load(folder, quantization=parse_quantization("int8", True))[1]
    with new_folder(tmp_path / "q") as out:
        save_quantized(open_checkpoint(folder), quantised, out)
    again, saved = load(tmp_path / "q")
    assert not again.tie_word_embeddings and torch.equal(saved.head.data, quantised.head.data)


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_tied_weights_may_be_stored_as_the_head_alone(make_checkpoint, model_type):
    folder = make_checkpoint(model_type, tie_word_embeddings=True)
    expected = load(folder)[1]

    def change(tensors):
        (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = tensors.pop(name)

    assert same(load(rewrite(folder, change))[1], expected)


def test_tensors_beside_the_model_are_warned_of_and_those_inside_a_layer_refused(make_checkpoint, refuse, caplog):
    folder, extra = make_checkpoint("opt"), torch.ones(3)
    expected = load(folder)[1]
    warn_once.cache_clear()
    rewrite(folder, lambda tensors: tensors.update({"v_head.summary.weight": extra, "score.bias": extra.clone()}))
    assert same(load(folder)[1], expected)
    assert "2 tensors are not part of the model: " in caplog.text and "v_head.summary.weight" in caplog.text
    rewrite(folder, lambda tensors: tensors.update({"model.decoder.layers.0.self_attn.q_norm.weight": extra}))
    assert "unexpected: " in refuse(folder) and "layers.0.self_attn.q_norm.weight" in refuse(folder)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ("x", "an unknown method"),
    ],
)
def test_weights_that_another_tool_quantised_are_refused_by_its_name(make_checkpoint, refuse, settings, method):
    message = refuse(edit_config(make_checkpoint("llama"), quantization_config=settings))
    assert f"quantised already, by {method} (quantization_config)" in message


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"sliding_window": 0}, "sliding_window must be a positive integer"),
        ("llama", {"sliding_window": -3}, "sliding_window must be a positive integer"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps must be a number in"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps must be a number in"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps must be a number in"),
        ("llama", {"rms_norm_eps": 2}, "norm_eps must be in"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a number in"),
        ("llama", {"hidden_act": "fatrelu", "hidden_act_param": math.nan}, "hidden_act_param must be a number in"),
        ("llama", {"rope_theta": math.inf}, "rope_theta must be a number in"),
        ("llama", {"rope_theta": 0}, "rope_theta must be a number in"),
        ("llama", {"rope_theta": -5.0}, "rope_theta must be a number in"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor must be a number in"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": -2.0}}, "factor must be a number in"),
        ("opt", {"max_position_embeddings": 2**60}, "max_position_embeddings must be a positive integer below"),
    ],
)
def test_numbers_out_of_range_are_refused(make_checkpoint, model_type, fields, message):
    """Each would load, and give nonsense."""
    folder = make_checkpoint(model_type)
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "rope_parameters"}
    kind = {"model_type": "mistral"} if "sliding_window" in fields else {}
    (folder / "config.json").write_text(json.dumps(config | kind | fields))
    with pytest.raises(DejavuError, match=message):
        load(folder)


def test_any_damage_to_a_checkpoint_is_a_clear_error_or_does_no_harm(make_checkpoint):
    """1,000 configs and headers with a value, a key or a byte changed: loaded with sane numbers, or DejavuError."""
    rng, loaded = random.Random(0), 0
    values = [None, 0, -1, 1, 7, 2**70, 1.5, -0.5, math.nan, math.inf, 1e300, "", "x", "relu", True, False, [], [1], {}]
    for model_type in ("opt", "llama"):
        folder = make_checkpoint(model_type)
        config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
        whole = file.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        for turn in range(500):
            if turn % 2:
                other = dict(config)
                for key in rng.sample(sorted(config), rng.choice([1, 1, 2])):
                    other[key] = rng.choice(values)
                    if rng.random() < 0.2:
                        del other[key]
                (folder / "config.json").write_text(json.dumps(other))
                file.write_bytes(whole)
            else:
                (folder / "config.json").write_text(json.dumps(config))
                data = bytearray(whole)
                for _ in range(rng.choice([1, 1, 4])):
                    data[rng.randrange(8 + size)] = rng.randrange(256)
                file.write_bytes(bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]))
            try:
                parsed, weights = load(folder)
            except DejavuError:
                continue
            loaded += 1
            assert 0 <= parsed.norm_eps <= 1 and (parsed.sliding_window is None or parsed.sliding_window > 0)
            assert parsed.rope is None or 0 < parsed.rope.theta < math.inf
            assert parsed.context >= 1 and weights.embed.shape == (parsed.vocab_size, parsed.embed_size)
    assert 20 < loaded < 900
