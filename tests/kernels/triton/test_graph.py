"""A decode step of the ops together, with random selections: against the reference, and as one CUDA graph."""

import os

import pytest
import torch

from dejavu.errors import KernelUnavailable
from dejavu.kernels import reference
from dejavu.kernels import triton as ops
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton.tiles import tickets

S, P, V = 48, 4, 61
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


class Step:
    """One layer with lazy keys and values, selected heads and selected neurons; its state is its tensors."""

    def __init__(self, backend, B, C, H, D, inter, device, dtype=torch.bfloat16):
        self.ops = backend
        torch.manual_seed(1)

        def make(*shape):
            return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype).to(device)

        self.embed, self.blocks, self.rows = make(V, C) * 8, make(H, 4, D, C), make(inter, 2, C)
        self.kv = torch.zeros(2, B, H, S, D, dtype=dtype, device=device)
        self.hidden = torch.zeros(B, P, C, device=device)
        self.kv_len = torch.zeros(B, H, dtype=torch.int32, device=device)
        ids, positions = torch.zeros(2, B, dtype=torch.int32, device=device)
        self.tokens = Tokens.one_a_row(positions, ids)
        self.head_scores, self.neuron_scores = torch.zeros(B, H, device=device), torch.zeros(B, inter, device=device)
        self.rows_read = torch.zeros(2, dtype=torch.int64, device=device)

    def set(self, position: int) -> None:
        """Put the same next inputs into any copy of this step."""
        generator = torch.Generator().manual_seed(position)
        for scores in (self.head_scores, self.neuron_scores):
            scores.copy_(torch.rand(scores.shape, generator=generator))
        self.tokens.ids.copy_(torch.randint(V, self.tokens.ids.shape, generator=generator))
        self.tokens.positions.fill_(position)

    def run(self):
        ops, norm = self.ops, {"kind": "layer", "eps": 1e-5}
        x = ops.embed(self.tokens, self.embed)
        y = ops.add_norm(x, None, None, None, None, **norm)
        heads = ops.select_topk(self.head_scores, 2)
        lazy = {"hidden": self.hidden, "kv_len": self.kv_len, "pending": P}
        q = ops.attn_qkv(y, self.blocks, None, None, self.tokens, *self.kv, heads, **lazy)
        o = ops.attend(q, *self.kv, self.tokens, heads, scale=0.2)
        y = ops.add_norm(x, ops.attn_out(o, self.blocks, heads), None, None, None, **norm)
        neurons = ops.select_threshold(self.neuron_scores, 0.8, self.neuron_scores.shape[1])
        partials = ops.mlp(y, self.rows, None, neurons, activation="relu", skip_zeros=True, rows_read=self.rows_read)
        return ops.linear(ops.add_norm(x, partials, None, None, None, **norm), self.embed)


@pytest.mark.parametrize("B", [1, 3])
def test_step_equals_the_reference(close, B):
    device = "cuda" if ON_GPU else "cpu"
    # In float32: a key or value rounded to bfloat16 may go the other way.
    mine = Step(ops, B, 40, 3, 10, 50, device, torch.float32)
    theirs = Step(reference, B, 40, 3, 10, 50, "cpu", torch.float32)
    for position in range(3):
        mine.set(position)
        theirs.set(position)
        close(mine.run().cpu(), theirs.run())
        assert torch.equal(mine.kv_len.cpu(), theirs.kv_len)


on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU, and not the interpreter")


@on_gpu
@pytest.mark.parametrize("B", [1, 2, 16])
def test_graph_equals_eager_bit_for_bit_at_every_position(B):
    eager, captured, first = (Step(ops, B, 2048, 16, 128, 8192, "cuda") for _ in range(3))
    first.run()
    with ops.capture() as capture:
        logits = captured.run()
    for position in range(S):
        eager.set(position)
        captured.set(position)
        capture.graph.replay()
        assert torch.equal(logits, eager.run()), position
        assert torch.equal(captured.kv, eager.kv)
    assert torch.equal(captured.rows_read, eager.rows_read)


@on_gpu
def test_runs_agree_bit_for_bit():
    """A race would show: 300 steps from one state, all programs counting in against each other."""
    step = Step(ops, 2, 4096, 32, 128, 16384, "cuda")
    for position in range(S):
        step.set(position)
        step.run()
    first = None
    for _ in range(300):
        step.kv_len.fill_(S - 3)
        logits = step.run()
        first = logits if first is None else first
        assert torch.equal(logits, first)


@on_gpu
def test_first_call_inside_a_capture_is_refused():
    with pytest.raises(KernelUnavailable, match="before capturing"), ops.capture():
        tickets("an op that never ran", 1, torch.device("cuda"))


@on_gpu
def test_read_bandwidth_is_a_gpus():
    assert 1e11 < ops.read_bandwidth(1 << 30, 3) < 2e13
