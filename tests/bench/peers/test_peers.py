"""The registry, its errors, and every peer that is installed against Hugging Face's own choice of tokens."""

import pytest
import torch

from dejavu.bench import peers
from dejavu.bench.decode import decode_times, greedy
from dejavu.bench.peers import PEERS, Source, peer
from dejavu.errors import ConfigError, DejavuError

# Multiples of 32 and of OpenVINO's groups.
CONFIG = {"model_type": "opt", "vocab_size": 256, "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256,
          "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
PROMPT, NEW = [2, 10, 20, 30], 12
NEEDS = [(name, package) for name, p in PEERS.items() for package in p.packages[:1]]


def test_names_and_what_is_missing(monkeypatch):
    with pytest.raises(ConfigError, match=r"'llama.cpp' does not exist; choose one of: .*did you mean llama-cpp\?"):
        peer("llama.cpp")
    assert PEERS["llama-cpp"].label == "llama.cpp (GPT-2 stand-in)"
    assert {"hf-eager", "hf-compiled"} <= set(peers.installed())
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    assert peers.installed() == ["hf-eager", "hf-compiled"]
    with pytest.raises(ConfigError, match=r"peer openvino: openvino not installed; pip install 'dejavu\[peers\]'"):
        peer("openvino").formats()


def test_formats_and_families_are_checked():
    with pytest.raises(ConfigError, match="peer hf-eager offers weights bf16, fp32 here, found 'int4'"):
        peer("hf-eager").check("int4", CONFIG)


@pytest.mark.parametrize(("name", "package"), NEEDS)
def test_a_peer_of_another_family_is_refused(name, package):
    pytest.importorskip(package, reason="comes with the extra peers")
    with pytest.raises(ConfigError, match="OPT models only, found model_type 'llama'"):
        peer(name).check(peer(name).formats()[-1], {"model_type": "llama"})


@pytest.mark.parametrize(("name", "package"), NEEDS)
def test_every_format_decodes_and_starts_afresh(name, package, tmp_path):
    pytest.importorskip(package, reason="comes with the extra peers")
    source = Source(CONFIG, seed=1)
    expected = greedy(peer("hf-eager").build(source, "fp32", capacity=64, threads=1, work=tmp_path), PROMPT, NEW)
    for weights in peer(name).formats():
        other = peer(name).build(source, weights, capacity=len(PROMPT) + NEW, threads=1, work=tmp_path)
        assert len(decode_times(other, PROMPT[:2], 4, 1).steps_s) == 4
        first = greedy(other, PROMPT, NEW)
        assert greedy(other, PROMPT, NEW) == first
        if weights == "fp32" and name != "llama-cpp":  # of a stand-in the text is its own
            assert first == expected
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}-{weights}" for weights in peer(name).formats()}


def test_a_conversion_that_fails_leaves_no_folder_and_its_message(monkeypatch, tmp_path):
    other = peers.Peer("hf-eager", "", PEERS["hf-eager"].module, ("torch",))
    module = other._module
    monkeypatch.setattr(module, "convert", lambda *args: torch.zeros(1).view(2), raising=False)
    with pytest.raises(DejavuError, match=r"peer hf-eager failed: .*invalid for input of size 1"):
        other.build(Source(CONFIG), "bf16", capacity=4, threads=1, work=tmp_path)
    assert not (tmp_path / "hf-eager-bf16").exists()
