"""`import dejavu` is fast: everything heavy is imported at use."""

import subprocess
import sys

import pytest

import dejavu


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_nothing_heavy_is_imported():
    heavy = "torch", "transformers", "safetensors", "huggingface_hub", "triton", "matplotlib", "rich", "typer"
    loaded = run("import sys, dejavu; print(*(m.split('.')[0] for m in sys.modules))").split()
    assert "dejavu" in loaded
    assert not set(heavy) & set(loaded)


def test_it_takes_no_time():
    # The best of a few: what the import costs, not what else the machine does. DESIGN's limit is 0.3 s.
    code = "import time, numpy; start = time.perf_counter(); import dejavu; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_the_public_names():
    for name in dejavu.__all__:
        assert getattr(dejavu, name) is not None
        assert name in dir(dejavu)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dejavu.nothing  # noqa: B018
