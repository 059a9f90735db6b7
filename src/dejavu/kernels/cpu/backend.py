"""The native library as a backend."""

from __future__ import annotations

import torch

from dejavu.kernels import cpu
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized


class CpuBackend(Backend):
    """Ops run on threads of their own; a recorded step is one native call, with the GIL released."""

    name = "cpu"
    can_record = True

    def __init__(self):
        super().__init__(cpu)

    empty = staticmethod(cpu.empty)
    read_bandwidth = staticmethod(cpu.read_bandwidth)
    num_threads = staticmethod(cpu.num_threads)
    isa, isas, set_isa = staticmethod(cpu.isa), staticmethod(cpu.isas), staticmethod(cpu.set_isa)

    def record(self, work, rehearse=None, shares=None):
        with cpu.capture() as capture:
            work()
        return capture.graph

    def set_threads(self, n: int) -> None:
        """Of the native library, and of PyTorch, which runs prompts. Raises: as kernels.cpu.set_threads."""
        cpu.set_threads(n)
        torch.set_num_threads(n)

    def matrix(self, weight, dtype):
        if not isinstance(weight, Quantized):
            return super().matrix(weight, dtype)
        out = self._scratch((weight.numel() // weight.width, weight.width), dtype)
        cpu.unpack(weight, out)
        return out


BACKEND = CpuBackend
