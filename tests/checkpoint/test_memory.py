"""Loading needs little more memory than what is loaded."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

MEASURE = """
import sys, torch
from dejavu.checkpoint.source import open_checkpoint
from dejavu.kernels import backend
from dejavu.model.load import load_weights

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
