"""Loading needs little more memory than what is loaded, and what would not fit is refused before it is taken."""

import json
import subprocess
import sys
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from dejavu import device
from dejavu.bench import shapes
from dejavu.checkpoint.layout import parse_quantization
from dejavu.checkpoint.source import open_checkpoint
from dejavu.errors import CapacityError
from dejavu.families.load import load_weights
from dejavu.kernels import backend

MEASURE = """
import sys, torch
from dejavu.checkpoint.source import open_checkpoint
from dejavu.kernels import backend
from dejavu.families.load import load_weights

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(2)
before = status("VmRSS:")
weights = load_weights(open_checkpoint(sys.argv[1]), ops=backend("reference"))[1]
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory(tmp_path, kind):
    """Most of the weights are in one tensor, the worst case; VmHWM also counts pages of mapped files."""
    C, inter, vocab = 1024, 4096, 50_000
    config = {"model_type": "opt", "activation_function": "relu", "hidden_size": C, "word_embed_proj_dim": C,
              "ffn_dim": inter, "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": vocab,
              "max_position_embeddings": 64, "enable_bias": False, "layer_norm_elementwise_affine": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (vocab, C), "embed_positions": (66, C)}
    shapes |= {f"layers.0.self_attn.{part}_proj": (C, C) for part in ("q", "k", "v", "out")}
    shapes |= {"layers.0.fc1": (inter, C), "layers.0.fc2": (C, inter)}
    tensors = {f"model.decoder.{n}.weight": torch.ones(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}
    shards = [dict(list(tensors.items())[:1]), dict(list(tensors.items())[1:])]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for i, shard in enumerate(shards):
        (save_file if kind == "safetensors" else torch.save)(shard, tmp_path / f"{stem}-{i}.{kind}")
    index = {name: f"{stem}-{i}.{kind}" for i, shard in enumerate(shards) for name in shard}
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))

    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    laid_out = sum(t.nbytes for t in tensors.values())
    # The lower bound shows that the measurement sees the weights at all.
    assert 0.98 * laid_out < int(run.stdout) < 1.15 * laid_out, f"{int(run.stdout) / laid_out:.3f}"


def hole(file, header: dict[str, tuple[tuple[int, ...], int]]) -> None:
    """A safetensors file of bfloat16 tensors, by shape and size in bytes, that takes no place on the disk."""
    entries, end = {}, 0
    for name, (shape, size) in header.items():
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + end)


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes")
def test_weights_larger_than_the_memory_are_refused(make_checkpoint):
    """A checkpoint of twice the machine's memory, in shards that are holes."""
    folder = make_checkpoint("opt", dtype=torch.bfloat16, num_hidden_layers=8)
    config = json.loads((folder / "config.json").read_text())
    inter, C = device.hardware()["memory_bytes"] // (8 * 2 * 36), 36
    shapes_of = {name: t.shape for name, t in load_file(folder / "model.safetensors").items()}
    wide = {"fc1.weight": (inter, C), "fc1.bias": (inter,), "fc2.weight": (C, inter)}
    config["ffn_dim"], shard_of = inter, {}
    for name, shape in shapes_of.items():
        shape = wide.get(name.partition(".layers.")[2][2:], shape)
        shard_of[name] = f"model-{len(shard_of)}.safetensors"
        hole(folder / shard_of[name], {name: (shape, 2 * prod(shape))})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (folder / "config.json").write_text(json.dumps(config))
    for weights, advice in ((None, "quantise them"), ("int8", "use a smaller format")):
        form = "bfloat16" if weights is None else "int8"
        with pytest.raises(CapacityError, match=rf"the weights in {form} would take .* GB, and .* are free; {advice}"):
            load_weights(open_checkpoint(folder), ops=backend("cpu"), quantization=parse_quantization(weights))


def test_a_file_that_cannot_be_mapped_is_refused(make_checkpoint, monkeypatch):
    def refuse(file, framework):
        raise RuntimeError(f"unable to mmap 50552173460 bytes from file <{file}>: Cannot allocate memory (12)")

    monkeypatch.setattr("dejavu.checkpoint.source.safe_open", refuse)
    with pytest.raises(
        CapacityError, match=r"model.safetensors: the system does not map .* \(12\)\); save the model in sh"
    ):
        _ = open_checkpoint(make_checkpoint()).headers


def test_random_weights_larger_than_the_memory_are_refused(monkeypatch):
    config = shapes.parse(shapes.shape("opt-125m"))
    monkeypatch.setattr(device, "free_memory", lambda where: 10**8)
    with pytest.raises(CapacityError, match=r"random weights: the weights in bfloat16 would take 0\.2"):
        shapes.random_weights(config, torch.bfloat16, backend("cpu"))
