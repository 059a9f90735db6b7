"""The Triton kernels as a backend."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dejavu.kernels import triton as ops
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized


class TritonBackend(Backend):
    """Ops run on the current GPU, in order; a recorded step is one CUDA graph."""

    name = "triton"
    device = torch.device(ops.DEVICE)
    can_record = ops.DEVICE == "cuda"
    records_torch = True

    def __init__(self):
        super().__init__(ops)

    beside = staticmethod(ops.beside)
    choose = staticmethod(ops.choose)
    empty = staticmethod(ops.empty)
    read_bandwidth = staticmethod(ops.read_bandwidth)
    sequential = staticmethod(ops.sequential)

    def record(self, work, rehearse=nullcontext, shares=None):
        with rehearse():
            work()
        with ops.capture(shares) as capture:
            work()
        return capture.graph

    def fetch(self, tensor):
        if self.device.type == "cpu":
            return super().fetch(tensor)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def result():
            done.synchronize()
            return copy

        return result

    def wait(self):
        torch.cuda.synchronize()

    def product_dtype(self, dtype):
        return dtype

    def matrix(self, weight, dtype):
        """As Backend.matrix, but quantised weights always in the narrow dtype, which the tensor cores multiply."""
        plain = weight.dequantize(dtype) if isinstance(weight, Quantized) else weight
        return plain.reshape(-1, plain.shape[-1])

    def matmul(self, x, w, bias=None):
        if x.dtype == w.dtype:
            return x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
        out = (x.to(w.dtype) @ w).to(x.dtype)
        return out if bias is None else out + bias


BACKEND = TritonBackend
