"""Nothing is timed in earnest here: one thread, and the process's own settings come back."""

import pytest
import torch

from dejavu.bench.peers import PEERS, Peer
from dejavu.kernels import backend

# A peer that ends as its model's config says, when it is built or when it first runs.
FAKE = """
import os, signal, sys, time

def formats():
    return "bf16", "fp32"

def end(how):
    if how == "raise":
        raise RuntimeError("no kernel")
    if how == "print":
        os.write(1, b"loaded\\n")
    elif how == "hang":
        time.sleep(60)
    elif how == "exit":
        sys.stderr.write("trying\\nout of luck\\n")
        sys.stderr.flush()
        os._exit(3)
    elif how:
        os.kill(os.getpid(), getattr(signal, how))

def build(source, weights, name, capacity):
    die = source.config.get("die", {})
    end(die.get("build"))
    return Fake(die.get("run"))

class Fake:
    def __init__(self, how):
        self.how = how

    def prefill(self, ids):
        end(self.how)
        return 1

    def step(self, token):
        return token
"""


@pytest.fixture
def fake_peers(tmp_path, monkeypatch):
    """A peer "fake" among the others."""
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PEERS, "fake", Peer("fake", "Fake", "fake_peer"))


@pytest.fixture(autouse=True)
def one_thread():
    ops = backend("cpu")
    torch_threads, threads = torch.get_num_threads(), ops.num_threads()
    torch.set_num_threads(1)
    ops.set_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    ops.set_threads(threads)
