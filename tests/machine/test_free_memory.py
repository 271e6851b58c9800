"""Free memory: what the system says, and less where a control group allows less."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.machine import free_memory
from flux_kernels.machine.free_memory import free_bytes, total_bytes

CPU, GIB = torch.device("cpu"), 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that writes a fake /proc and /sys/fs/cgroup: 16 GiB, 12 of them available."""
    monkeypatch.setattr(free_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {12 * 2**20} kB\n")

    def make(membership: str = "0::/\n", **groups: dict[str, str]):
        (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
        for place, files in groups.items():
            folder = tmp_path / "cgroup" / place.replace("__", "/").removeprefix("root")
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text)

    return make


def v2(limit: int | str, used: int, of_files: int = 0) -> dict[str, str]:
    stat = f"anon 1\nactive_file {of_files}\ninactive_file 0\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def v1(limit: int, used: int, of_files: int = 0) -> dict[str, str]:
    stat = f"cache 1\ntotal_active_file 0\ntotal_inactive_file {of_files}\n"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


def test_without_limits_it_is_what_the_system_says(machine):
    machine()
    assert (free_bytes(CPU), total_bytes()) == (12 * GIB, 16 * GIB)
    machine("0::/user\n4:memory:/\n", user=v2("max", GIB), memory=v1(2**63 - 4096, GIB))
    assert (free_bytes(CPU), total_bytes()) == (12 * GIB, 16 * GIB)


def test_a_control_group_of_version_2_limits_it(machine):
    """Pages of files count as free: they are given back before anything is killed."""
    machine("0::/job/one\n", job__one=v2(8 * GIB, 5 * GIB, of_files=2 * GIB))
    assert (free_bytes(CPU), total_bytes()) == (5 * GIB, 8 * GIB)


def test_a_group_around_it_limits_it_too(machine):
    machine("0::/job/one\n", job=v2(4 * GIB, GIB), job__one=v2("max", GIB))
    assert (free_bytes(CPU), total_bytes()) == (3 * GIB, 4 * GIB)


def test_a_container_that_sees_its_own_group_as_the_root(machine):
    machine("0::/docker/not-seen-here\n", root=v2(2 * GIB, GIB // 2))
    assert (free_bytes(CPU), total_bytes()) == (3 * GIB // 2, 2 * GIB)


def test_a_control_group_of_version_1_limits_it(machine):
    machine("5:cpu:/\n4:memory:/job\n0::/\n", memory__job=v1(6 * GIB, 5 * GIB, of_files=GIB))
    assert (free_bytes(CPU), total_bytes()) == (2 * GIB, 6 * GIB)
    machine("4:memory:/job\n", memory__job=v1(6 * GIB, 7 * GIB))
    assert free_bytes(CPU) == 0


def test_elsewhere_psutil_is_asked(tmp_path, monkeypatch):
    psutil = pytest.importorskip("psutil", reason="comes with accelerate")
    monkeypatch.setattr(free_memory, "_PROC", tmp_path)
    free, total = free_bytes(CPU), total_bytes()
    assert 0 < free < total == psutil.virtual_memory().total


def test_here_and_where_nothing_is_told():
    free = free_bytes(CPU)
    assert free is None or 1e7 < free < 1e14
    assert free_bytes(torch.device("meta")) is None
