"""The kernels' tests run on a GPU where there is one, or else in Triton's interpreter, in a process of its own.

`TRITON_INTERPRET=1 pytest tests/kernels/triton` runs them in the interpreter; without the variable and without a GPU,
test_interpreter.py does so. On a GPU every test here has the marker `gpu`.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dejavu.kernels import reference
from dejavu.kernels import triton as ops
from dejavu.kernels.quantized import Quantized
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED

if INTERPRETED:
    collect_ignore = ["test_compile.py", "test_interpreter.py"]
elif ON_GPU:
    collect_ignore = ["test_interpreter.py"]
else:
    elsewhere = ("test_compile.py", "test_contract.py", "test_interpreter.py")
    collect_ignore = [f.name for f in Path(__file__).parent.glob("test_*.py") if f.name not in elsewhere]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if ON_GPU and Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


# Odd widths, of no multiple of 8 or 16; on a GPU also one so wide that the real tiles loop.
SIZES = [(129, torch.bfloat16), (48, torch.float16), (48, torch.float32)]
if ON_GPU:
    SIZES.append((2312, torch.bfloat16))


@pytest.fixture(params=SIZES, ids=str)
def size(request) -> tuple[int, torch.dtype]:
    """Width of the hidden states and dtype of the weights."""
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter: tiles and grids so small that the loops go round with tiny sizes too."""
    torch.manual_seed(0)
    if not INTERPRETED:
        return
    small = {"BN": 16, "BC": 32, "SPLIT": 2, "BT": 16, "SPLITS": 12, "PROGRAMS": 3, "num_warps": 1}
    # Four bits are read by lines of 64 values in a batch of one.
    lines = small | {"BC": 64}
    table = {
        key: tuple(
            {
                name: min(value, (lines if "int4" in key[0] and one else small).get(name, value))
                for name, value in t.items()
            }
            for t, one in zip(entry, (True, False), strict=True)
        )
        for key, entry in tuning.TABLE.items()
    }
    monkeypatch.setattr(tuning, "TABLE", table)
    monkeypatch.setattr(tuning, "PROGRAMS", 3)
    for module, name, value in (("attend", "_MAX_SPLITS", 2), ("select", "_BLOCK", 64), ("select", "_HELD", 128)):
        monkeypatch.setattr(importlib.import_module(f"dejavu.kernels.triton.{module}"), name, value)
    interpret_bfloat16_products(monkeypatch)


def interpret_bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as 16 bits in an integer, and would multiply those: hand it float32."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == bfloat16:
            a, b = self.cast_impl(a, float32), self.cast_impl(b, float32)
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def _copied(value, device):
    if isinstance(value, tuple):
        parts = [_copied(part, device) for part in value]
        return Tokens(*parts) if isinstance(value, Tokens) else tuple(parts)
    if isinstance(value, Quantized):
        return Quantized(value.data.clone().to(device), value.width, value.format)
    return value.clone().to(device) if isinstance(value, Tensor) else value


@pytest.fixture
def both() -> Callable:
    """`both(name, *args, **kwargs)`: an op's result, the reference's, and the copies of args that each has mutated."""

    def run(name: str, *args, **kwargs):
        device = "cuda" if ON_GPU else "cpu"
        mine, theirs = _copied(args, device), _copied(args, "cpu")
        my_kwargs = {key: _copied(value, device) for key, value in kwargs.items()}
        their_kwargs = {key: _copied(value, "cpu") for key, value in kwargs.items()}
        result = getattr(ops, name)(*mine, **my_kwargs)
        # Where weights are quantised, the reference gets what they stand for.
        plain = [arg.dequantize() if isinstance(arg, Quantized) else arg for arg in theirs]
        expected = getattr(reference, name)(*plain, **their_kwargs)
        mine, my_kwargs = _copied(mine, "cpu"), {key: _copied(value, "cpu") for key, value in my_kwargs.items()}
        return _copied(result, "cpu"), expected, (*mine, my_kwargs), (*theirs, their_kwargs)

    return run


@pytest.fixture
def close() -> Callable[[Tensor, Tensor], None]:
    """Assert that a float32 result is the reference's but for the order of its sums.

    Two bfloat16 numbers hold an activation to 2^-16, where one of them would hold it to 2^-9.
    """

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        error = (actual - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-4, f"relative error {error}"

    return check


@pytest.fixture
def close_rounded() -> Callable[[Tensor, Tensor], None]:
    """Assert that values stored in a low precision are the reference's, or its neighbours."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        step = max(torch.finfo(actual.dtype).eps, 1e-4)
        torch.testing.assert_close(actual, expected, rtol=step, atol=1e-4)

    return check


@pytest.fixture
def selection() -> Callable:
    """`selection(n, count, capacity)`: `count` random units of n, sorted; the rest of the buffer holds rubbish."""

    def make(n: int, count: int, capacity: int) -> tuple[Tensor, Tensor]:
        idx = torch.full((capacity,), 2**31 - 1, dtype=torch.int32)
        idx[:count] = torch.randperm(n)[:count].sort().values.int()
        return idx, torch.tensor([count], dtype=torch.int32)

    return make
