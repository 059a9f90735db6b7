"""Read bandwidth: by the backend's own threads where it can, by PyTorch otherwise."""

from types import SimpleNamespace

import pytest

from dejavu.bench.bandwidth import BUFFER_BYTES, read_bandwidth
from dejavu.kernels import backend


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_it_is_that_of_a_real_machine(name):
    # From a slow board's memory to far beyond any cache: a wrong unit or a read that is optimised away falls outside.
    assert 1e8 < read_bandwidth(backend(name), 64 << 20, 2) < 1e13


def test_the_backend_measures_where_it_can():
    asked = []
    ops = SimpleNamespace(read_bandwidth=lambda *args: asked.append(args) or 7.0)
    assert read_bandwidth(ops) == 7.0
    assert asked == [(BUFFER_BYTES, 3)]
