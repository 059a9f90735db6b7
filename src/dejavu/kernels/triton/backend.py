"""The Triton kernels as a backend."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dejavu.kernels import triton as ops
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized


class TritonBackend(Backend):
    """Ops run on the current GPU, in order; a recorded step is one CUDA graph, in a memory pool of its own."""

    name = "triton"
    device = torch.device(ops.DEVICE)
    can_record = ops.DEVICE == "cuda"
    records_torch = True

    def __init__(self):
        super().__init__(ops)

    beside = staticmethod(ops.beside)
    empty = staticmethod(ops.empty)
    read_bandwidth = staticmethod(ops.read_bandwidth)
    sequential = staticmethod(ops.sequential)

    def record(self, work, rehearse=nullcontext):
        with rehearse():
            work()
        with ops.capture() as capture:
            work()
        return capture.graph

    def fetch(self, *tensors):
        if self.device.type == "cpu":
            return super().fetch(*tensors)
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        done = torch.cuda.Event()
        done.record()

        def result():
            done.synchronize()
            return copies

        return result

    def wait(self):
        torch.cuda.synchronize()

    def plain(self, weight, dtype):
        """As Backend.plain, but quantised weights in `dtype`, which the tensor cores multiply."""
        return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight

    def matmul(self, x, w):
        return (x.to(w.dtype) @ w).float()


BACKEND = TritonBackend
