"""Peaks are measured once, stored with their conditions and read again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.core.errors import ResourceError
from infopt.core.hardware.calibration import calibration_file, load_calibration
from infopt.core.profiling import peaks as module
from infopt.core.profiling.calibrate import Ceilings, Rate
from infopt.core.profiling.peaks import device_peaks


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The bandwidths that were measured, newest last; each measurement finds 1 GB/s less."""
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    found: list[float] = []

    def measure(device: torch.device, dtype: torch.dtype, **_: Any) -> Ceilings:
        found.append((10 - len(found)) * 1e9)
        reader = Rate("sum", found[-1], 1e9)
        return Ceilings((reader,), (Rate("gemm 1x1x1", 2e9 + len(found), 1e9),), 2**20)

    monkeypatch.setattr(module, "measure_ceilings", measure)
    return found


def test_measured_once(measured: list[float]) -> None:
    first = device_peaks("cpu", "A Chip", "float32")
    second = device_peaks("cpu", "A Chip", "float32")
    assert measured == [10e9]
    assert (first.origin, second.origin) == ("measured", "calibrated")
    assert first.peaks == second.peaks
    assert first.peaks.bytes_per_s == 10e9
    assert first.peaks.threads == torch.get_num_threads()
    assert first.peaks.conditions["best reader"] == "sum"
    assert "load average before" in first.peaks.conditions


def test_each_dtype_has_its_own(measured: list[float]) -> None:
    device_peaks("cpu", "A Chip", "float32")
    assert device_peaks("cpu", "A Chip", "bfloat16").origin == "measured"
    assert device_peaks("cpu", "Another Chip", "float32").origin == "measured"
    assert len(measured) == 3


def test_what_was_reached_can_be_reached(measured: list[float]) -> None:
    """A second measurement never lowers a peak, and is what is stored."""
    first = device_peaks("cpu", "A Chip", "float32").peaks
    again = device_peaks("cpu", "A Chip", "float32", at_least=first)
    assert again.origin == "measured"
    assert measured == [10e9, 9e9]
    assert again.peaks.bytes_per_s == 10e9
    assert again.peaks.flops_per_s == 2e9 + 2
    record, _ = load_calibration("A Chip", "float32", torch.get_num_threads())
    assert record is not None and record.flops_per_s == 2e9 + 2


def test_a_damaged_record_is_measured_again_and_told(measured: list[float]) -> None:
    device_peaks("cpu", "A Chip", "float32")
    calibration_file("A Chip", "float32", torch.get_num_threads()).write_text("{")
    again = device_peaks("cpu", "A Chip", "float32")
    assert again.origin == "measured"
    assert "is damaged" in again.warnings[0]


def test_a_cache_that_cannot_be_written_is_told(
    measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise ResourceError("no space left")

    monkeypatch.setattr(module, "store_calibration", refuse)
    found = device_peaks("cpu", "A Chip", "float32")
    assert found.warnings == ("the measured peaks could not be stored: no space left",)


def test_a_busy_machine_is_told_each_time(
    measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = 2.0 * torch.get_num_threads()
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    for origin in ("measured", "calibrated"):
        found = device_peaks("cpu", "A Chip", "float32")
        assert found.origin == origin
        assert f"load average of {load:.2f}" in found.warnings[0]
