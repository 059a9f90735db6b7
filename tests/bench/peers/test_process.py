"""Peers in processes of their own: a death is a reason, and the one who asked goes on."""

import gc
import os

import pytest

from dejavu.bench.peers import PEERS, Peer, Source
from dejavu.bench.peers import process as module
from dejavu.bench.peers.process import PeerDied, PeerProcess

CONFIG = {"model_type": "opt", "vocab_size": 101, "hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 50,
          "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def start(fake_peers, tmp_path):
    def build(name="fake", config=CONFIG, weights="fp32"):
        return PeerProcess(PEERS[name], Source(config), weights, capacity=32, threads=1, work=tmp_path)

    return build


def test_hugging_face_runs_in_turns_and_ends_with_its_object(start):
    one, other = start("hf-eager"), start("hf-eager")
    for peer in (one, other, one):
        times = peer.run([1, 2, 3], 4, 1)
        assert times.prefill_s > 0 and len(times.steps_s) == 4 and all(s > 0 for s in times.steps_s)
    pid = one._process.pid
    assert pid != other._process.pid != os.getpid()
    del one, peer
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(other.run([1, 2], 2, 0).steps_s) == 2


@pytest.mark.parametrize("how, message", [
    ("SIGSEGV", r"^died: signal 11 \(SIGSEGV\)$"), ("SIGILL", r"^died: signal 4 \(SIGILL\)$"),
    ("SIGKILL", r"^died: signal 9"), ("exit", r"^died: exit code 3 \(out of luck\)$"), ("raise", "^failed: no kernel$"),
])  # fmt: skip
@pytest.mark.parametrize("when", ["build", "run"])
def test_a_death_is_told_by_its_cause(start, how, message, when):
    config = CONFIG | {"die": {when: how}}
    if when == "build":
        with pytest.raises(PeerDied, match=message):
            start(config=config)
        return
    peer = start(config=config)
    with pytest.raises(PeerDied, match=message):
        peer.run([1, 2, 3], 2, 0)


def test_what_a_peer_prints_is_no_answer(start):
    assert len(start(config=CONFIG | {"die": {"run": "print"}}).run([1], 2, 0).steps_s) == 2


def test_one_that_never_answers_is_ended(start, monkeypatch):
    peer = start(config=CONFIG | {"die": {"run": "hang"}})
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    with pytest.raises(PeerDied, match=r"died: no answer in 0 s"):
        peer.run([1], 2, 0)
    assert peer._process.poll() is not None


def test_a_peer_is_named_by_a_module():
    assert all(isinstance(p, Peer) and p.module.startswith("dejavu.bench.peers.") for n, p in PEERS.items())
