"""The Triton backend: the ops of reference.py for NVIDIA GPUs of compute capability 8.0 and up.

No op synchronises with the host or has a shape that depends on data: counts, positions and lengths are read on the
device, so a captured step is right at every position. Sums are taken in an order that follows from shapes and
selections alone, in float32, without atomics on floats: a run equals the next, and a graph equals eager.
"""

from dejavu.kernels.triton.add_norm import add_norm
from dejavu.kernels.triton.attend import attend
from dejavu.kernels.triton.attn_qkv import attn_qkv
from dejavu.kernels.triton.bandwidth import read_bandwidth
from dejavu.kernels.triton.choose import choose
from dejavu.kernels.triton.embed import add_positions, embed
from dejavu.kernels.triton.graph import DEVICE, beside, capture, empty, sequential
from dejavu.kernels.triton.linear import linear
from dejavu.kernels.triton.mlp import mlp
from dejavu.kernels.triton.select import select_threshold, select_topk
from dejavu.kernels.triton.sum_rows import attn_out

__all__ = [
    "DEVICE",
    "add_norm",
    "add_positions",
    "attend",
    "attn_out",
    "attn_qkv",
    "beside",
    "capture",
    "choose",
    "embed",
    "empty",
    "linear",
    "mlp",
    "read_bandwidth",
    "select_threshold",
    "select_topk",
    "sequential",
]
