"""Energy by a counter of known steps, and by files like the kernel's."""

import time
from pathlib import Path

import pytest

from infopt.core.errors import UnsupportedError
from infopt.core.profiling.energy import EnergyCounter, energy_counter


def test_idle_power_is_taken_off() -> None:
    """Idle 10 W, working 30 W more: work of 20 ms takes 0.6 J, whatever a machine adds to it."""
    began = time.perf_counter()
    worked = 0.0

    def read() -> float:
        return 10 * (time.perf_counter() - began) + 30 * worked

    def work() -> None:
        nonlocal worked
        time.sleep(0.005)
        worked += 0.02

    counter = EnergyCounter("a counter", read, idle_seconds=0.05)
    assert counter.joules_of(work, times=5) == pytest.approx(0.6, rel=0.05)


def test_a_counter_that_wraps() -> None:
    values = iter([5.0, 5.0, 98.0, 3.0])
    counter = EnergyCounter("a counter", lambda: next(values), wraps_at=100.0, idle_seconds=0.01)
    assert counter.joules_of(lambda: None, times=1) == pytest.approx(5.0)


def test_files_like_the_kernels(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "energy_uj").write_text("2500000\n")
    (package / "max_energy_range_uj").write_text("262143328850\n")
    core = tmp_path / "intel-rapl:0:0"  # a part of the package: counted with it
    core.mkdir()
    (core / "energy_uj").write_text("1\n")
    counter = energy_counter("cpu", powercap=tmp_path)
    assert counter.read() == 2.5 and counter.source == "RAPL"
    assert counter.wraps_at == pytest.approx(262143.32885)


def test_no_counter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="shows no energy counter"):
        energy_counter("cpu", powercap=tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    with pytest.raises(UnsupportedError, match="cannot be read"):
        energy_counter("cpu", powercap=tmp_path)
