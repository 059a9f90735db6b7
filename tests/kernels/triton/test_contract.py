"""The backend offers every op of the reference, with the same signature, and refuses a machine without a GPU."""

import inspect

import pytest
import torch

from dejavu.errors import KernelUnavailable
from dejavu.kernels import backend, reference
from dejavu.kernels import triton as ops

# Helpers of the reference, not ops.
_HELPERS = {"activate", "rotate"}
_FUNCTIONS = [n for n, f in vars(reference).items() if inspect.isfunction(f) and f.__module__ == reference.__name__]
_OPS = [name for name in _FUNCTIONS if name[0] != "_" and name not in _HELPERS]


@pytest.mark.parametrize("name", _OPS)
def test_signature_is_the_references(name):
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))


def test_explicit_choice_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelUnavailable, match="needs an NVIDIA GPU"):
        backend("triton")


def test_auto_takes_it_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backend("auto") is backend("triton") and backend("auto").name == "triton"
    assert backend("auto")._ops is ops
