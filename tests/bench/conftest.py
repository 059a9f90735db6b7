"""Nothing is timed in earnest here: one thread, and the process's own settings come back."""

import pytest
import torch

from dejavu.kernels import backend


@pytest.fixture(autouse=True)
def one_thread():
    ops = backend("cpu")
    torch_threads, threads = torch.get_num_threads(), ops.num_threads()
    torch.set_num_threads(1)
    ops.set_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    ops.set_threads(threads)
