"""Every kernel compiles for Ampere and Hopper, with 16-byte loads of weights, on a machine without a GPU.

The ops run on tensors without memory, in the real shapes of OPT-6.7B and with the real tiles, up to the launch.
"""

import re

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dejavu.kernels import triton as ops
from dejavu.kernels.quantized import Quantized, RowFormat
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.bandwidth import _read

C, INTERMEDIATE, H, D, S = 4096, 16384, 32, 128, 2048


class NoDevice:
    """A driver that names a target and has no device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device: not that of a GPU which may be here.
        return -self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture(params=[80, 90], ids="sm{}".format)
def compiled(request, monkeypatch):
    """Kernels as they are compiled, in place of being launched: (name, PTX)."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert all(size > 0 for size in grid)
        kernels.append((self.fn.__name__, kernel.asm["ptx"]))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(tuning, "family", lambda: f"sm{request.param}")
    monkeypatch.setattr(driver, "_active", NoDevice(request.param))
    return kernels


def make(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def select(n):
    return make(n, dtype=torch.int32), make(1, dtype=torch.int32)


def check_weight_loads(kernels, expected):
    """The kernels are as expected, and load weights 16 bytes at a time.

    Some versions of Triton mark the loads of weights with the hint that they leave the cache first.
    """
    assert [name for name, _ in kernels] == expected
    for name, ptx in kernels:
        assert len(re.findall(r"cp\.async\.cg\S* .*0x10\b", ptx)) >= 8, name
        assert not re.search(r"ld\.global\S*\.b(8|16)\b", ptx), name
        hinted = re.findall(r"(?:cp\.async|ld\.global)\S*cache_hint.*?;", ptx)
        assert all("0x10" in load for load in hinted), (name, hinted)


@pytest.mark.parametrize("B", [1, 16])
def test_matrix_kernels(compiled, B):
    x, blocks, tokens = make(B, C), make(H, 4, D, C, dtype=torch.bfloat16), Tokens(*3 * [make(B, dtype=torch.int32)])
    caches = [make(B, H, S, D, dtype=torch.bfloat16) for _ in range(2)]
    lazy = {"hidden": make(B, 32, C), "kv_len": make(B, H, dtype=torch.int32), "pending": 25}
    ops.linear(x, make(50272, C, dtype=torch.bfloat16))
    ops.attn_qkv(x, blocks, make(H, 3, D), make(S, D), tokens, *caches, select(H), **lazy)
    ops.attn_out(make(B, H, D), blocks, select(H))
    rows, rows_read = make(INTERMEDIATE, 3, C, dtype=torch.bfloat16), make(3, dtype=torch.int64)
    ops.mlp(x, rows, make(INTERMEDIATE, 2), select(4096), activation="relu", skip_zeros=True, rows_read=rows_read)
    check_weight_loads(compiled, ["_linear", "_attn_qkv", "_attn_pending", "_sum_rows", "_mlp_in", "_sum_rows"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_weights(compiled, dtype):
    ops.mlp(make(2, C), make(INTERMEDIATE, 2, C, dtype=dtype), None, activation="gelu")
    check_weight_loads(compiled, ["_mlp_in", "_sum_rows"])


@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("form", ["int8", "int4", "int4-g32z"])
def test_quantized_weights(compiled, form, B):
    form = RowFormat.parse(form)

    def rows(*shape):
        return Quantized(make(*shape[:-1], form.row_bytes(shape[-1]), dtype=torch.uint8), shape[-1], form)

    x, blocks, tokens = make(B, C), rows(H, 4, D, C), Tokens(*3 * [make(B, dtype=torch.int32)])
    caches = [make(B, H, S, D, dtype=torch.bfloat16) for _ in range(2)]
    lazy = {"hidden": make(B, 32, C), "kv_len": make(B, H, dtype=torch.int32), "pending": 25}
    ops.linear(x, rows(50272, C))
    ops.attn_qkv(x, blocks, make(H, 3, D), None, tokens, *caches, select(H), **lazy)
    ops.attn_out(make(B, H, D), blocks, select(H))
    ops.mlp(x, rows(INTERMEDIATE, 2, C), make(INTERMEDIATE), select(4096), activation="relu", skip_zeros=True)
    ops.embed(tokens, rows(50272, C))
    names = ["_linear", "_attn_qkv", "_attn_pending", "_sum_rows", "_mlp_in", "_sum_rows", "_gather"]
    if form.bits == 4 and B == 1:
        for name in ("_linear", "_attn_qkv", "_mlp_in"):
            names.insert(names.index(name), "_spread")
    assert [name for name, _ in compiled] == names
    if B == 1:
        for name, ptx in compiled[:-1]:
            if name == "_spread":
                continue
            assert re.search(r"cp\.async\.cg\S* .*0x10\b", ptx), name


def test_kernels_wait_for_their_inputs_where_they_may_start_early(compiled, request):
    """Every kernel of a step: one that did not wait would read what is still being written."""
    x = make(1, C)
    ops.add_norm(x, make(3, 1, C), None, None, None, kind="layer", eps=1e-5)
    ops.linear(x, make(50272, C, dtype=torch.bfloat16))
    ops.select_topk(make(1, INTERMEDIATE), 1000)
    hopper = request.node.callspec.params["compiled"] >= 90
    assert [("griddepcontrol.wait" in ptx) for _, ptx in compiled] == [hopper] * 4


@pytest.mark.parametrize("G", [H, 8])
def test_attend(compiled, G):
    q, k = make(2, H, D), make(2, G, S, D, dtype=torch.bfloat16)
    ops.attend(q, k, k, Tokens(*3 * [make(2, dtype=torch.int32)]), select(H), scale=0.1, window=1000)
    ((_, ptx),) = compiled
    assert re.search(r"ld\.global\.v4|cp\.async\.cg.*0x10", ptx)


def test_small_kernels(compiled):
    x, tokens = make(2, C), Tokens(*3 * [make(2, dtype=torch.int32)])
    table = make(2050, C, dtype=torch.bfloat16)
    ops.embed(tokens, table)
    ops.add_positions(x, tokens, table, 2)
    ops.add_norm(x, make(33, 2, C), make(C), make(C), make(C), kind="layer", eps=1e-5)
    ops.select_threshold(make(1, INTERMEDIATE), 0.5, 4096)
    ops.select_topk(make(2, H), 12)
    _read[(8,)](make(4097, dtype=torch.int32), make(8, dtype=torch.int32), 4097, BLOCK=4096)
    expected = ["_gather", "_gather", "_add_norm", "_rank", "_compact", "_rank", "_unite", "_compact", "_read"]
    assert [name for name, _ in compiled] == expected
