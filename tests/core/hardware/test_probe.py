import os
from pathlib import Path

import psutil
import pytest

from infopt.core.hardware.probe import (
    Gpu,
    cgroup_folders,
    cpu_name,
    cpu_quota,
    isa_flags,
    memory,
    parse_cpuinfo,
    parse_nvidia_smi,
    physical_cores,
    probe,
)

# Two sockets, two cores each, two threads a core.
CPUINFO = "\n\n".join(
    f"processor\t: {n}\nmodel name\t: Some CPU @ 2.0GHz\nphysical id\t: {n // 2 % 2}\n"
    f"core id\t\t: {n % 2}\nflags\t\t: fpu sse avx avx2 fma avx512_bf16 unknown"
    for n in range(8)
)
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimd"
ALL = frozenset(range(8))


def test_names_and_flags() -> None:
    processors = parse_cpuinfo(CPUINFO)
    assert cpu_name(processors) == "Some CPU @ 2.0GHz"
    assert isa_flags(processors) == ("avx", "avx2", "fma", "avx512_bf16")
    assert isa_flags(parse_cpuinfo(ARM)) == ("asimd", "i8mm", "bf16")
    assert isa_flags([]) == () and cpu_name([])


@pytest.mark.parametrize(
    ("allowed", "quota", "cores"),
    [
        (ALL, None, 4),
        (frozenset({0, 4}), None, 1),  # two threads of one core
        (frozenset({0, 1, 2}), None, 3),
        (ALL, 2, 2),
        (ALL, 100, 4),
        (frozenset({0}), 1, 1),
    ],
)
def test_physical_cores(allowed: frozenset[int], quota: int | None, cores: int) -> None:
    assert physical_cores(parse_cpuinfo(CPUINFO), allowed, quota) == cores


def test_cores_without_core_ids() -> None:
    assert physical_cores(parse_cpuinfo(ARM), frozenset({0, 1}), None) == 2


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("", None),
    ],
)
def test_cpu_quota(tmp_path: Path, text: str, quota: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_cpu_quota_of_the_first_cgroups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for text, quota in (("-1\n", None), ("300000\n", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(text)
        assert cpu_quota(tmp_path) == quota


def test_memory_limit_of_a_cgroup(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    assert memory(tmp_path)[0] == machine
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path)[0] == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert memory(tmp_path) == (1_000_000, 500_000)


def test_cgroups_of_this_process(tmp_path: Path) -> None:
    inner = tmp_path / "user.slice" / "app"
    inner.mkdir(parents=True)
    text = "0::/user.slice/app\n1:cpu,cpuacct:/elsewhere\n"
    assert cgroup_folders(text, tmp_path) == [inner, inner.parent, tmp_path]
    assert cgroup_folders("0::/../../x\n", tmp_path) == [tmp_path]
    assert cgroup_folders("", tmp_path) == [tmp_path]


def test_nvidia_smi() -> None:
    text = "0, NVIDIA H200, 143771, 9.0, 570.1\n1, [N/A], [N/A], 8.0, x\nnonsense\n"
    assert parse_nvidia_smi(text) == (Gpu(0, "NVIDIA H200", 143771 << 20, "9.0", "570.1"),)


def test_this_machine() -> None:
    found = probe()
    assert 1 <= found.physical_cores <= found.logical_cores <= (os.cpu_count() or 1)
    assert 0 < found.memory_available_bytes <= found.memory_total_bytes
    assert found.cpu
