"""Data types, threads, and the facts that benchmark records hold."""

import logging
import os

import pytest
import torch

from dejavu import device
from dejavu.errors import CapacityError, ConfigError, KernelUnavailable


@pytest.mark.parametrize("name", ["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"])
def test_parse_dtype(name):
    bits = 32 if "32" in name else 16
    assert device.parse_dtype(name).itemsize * 8 == bits
    assert ("b" in name) == (device.parse_dtype(name) == torch.bfloat16)


@pytest.mark.parametrize("name", ["int8", "auto", "", "Float32", "tensor"])
def test_an_unknown_dtype_says_what_there_is(name):
    with pytest.raises(ConfigError, match="fp32, bf16, fp16"):
        device.parse_dtype(name)


@pytest.mark.parametrize(
    ("asked", "stored", "where", "expected"),
    [
        ("auto", "float32", "cpu", torch.float32),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("auto", "float16", "cpu", torch.bfloat16),
        ("auto", "float16", "cuda", torch.float16),
        ("bf16", "float32", "cpu", torch.bfloat16),
        ("fp32", "float16", "cpu", torch.float32),
        ("fp16", "bfloat16", "cuda:0", torch.float16),
    ],
)
def test_choose_dtype(asked, stored, where, expected):
    assert device.choose_dtype(asked, stored, where) == expected


def test_fp16_on_a_cpu_is_said_once_when_automatic_and_an_error_when_asked_for(caplog):
    device.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "dejavu"):
        for _ in range(2):
            device.choose_dtype("auto", "float16", "cpu")
    assert [r.message for r in caplog.records if "bf16" in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1
    with pytest.raises(KernelUnavailable, match="fp16"):
        device.choose_dtype("fp16", "float16", "cpu")


def test_default_threads_stays_within_affinity(monkeypatch):
    assert 1 <= device.default_threads() <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5, 7}, raising=False)
    for quota, threads in ((None, 4), (2.5, 2), (0.5, 1), (64.0, 4)):
        monkeypatch.setattr(device, "_cgroup_cpus", lambda root, quota=quota: quota)
        assert device.default_threads() == threads


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    ],
)
def test_cgroup_quota(tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert device._cgroup_cpus(tmp_path) == cpus


def test_hardware_facts():
    facts = device.hardware()
    assert set(facts) == {"cpu", "cores", "memory_bytes", "gpu"}
    assert facts["cpu"] and facts["memory_bytes"] > 2**28
    assert (facts["gpu"] is not None) == torch.cuda.is_available()


def limits(at: str, limit: str, cached: int = 0, v1: bool = False) -> dict[str, str]:
    """The files of a cgroup that uses 500 bytes."""
    names = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
    values = {names[0]: limit, names[1]: "500", "stat": f"anon 1\ninactive_file {cached}\n"}
    return {f"{at}memory.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("nonsense", {}, []),
        ("0::/a/b\n", limits("", "900\n", 30), [430]),
        ("0::/a/b\n", limits("a/b/", "max\n"), []),
        ("0::/a/b\n", limits("a/b/", "700") | limits("a/", "600"), [200, 100]),
        ("9:cpu:/z\n4:hugetlb,memory:/a\n0::/\n", limits("memory/a/", "900", 4, v1=True), [404]),
    ],
)
def test_cgroup_memory(tmp_path, own, files, left):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert device._cgroup_memory(tmp_path, tmp_path / "own") == left


def test_memory_that_is_not_there_is_refused_with_the_figures(monkeypatch):
    assert 2**27 < device.free_memory() <= device.hardware()["memory_bytes"]
    device.require_memory(2**20, "cpu", "this", "never")
    monkeypatch.setattr(device, "free_memory", lambda where: 10**9)
    device.require_memory(10**9, "cpu", "this", "never")
    with pytest.raises(CapacityError, match=r"^this would take 2,500.00 GB, and 1.00 GB are free; buy more$"):
        device.require_memory(2.5e12, "cpu", "this", "buy more")
