from pathlib import Path

import pytest
from pydantic import ValidationError

from infopt.core.hardware.calibration import (
    Calibration,
    calibration_file,
    load_calibration,
    store_calibration,
)

RECORD = Calibration(
    device="AMD EPYC 7763 64-Core Processor",
    dtype="float32",
    threads=2,
    flops_per_s=9e10,
    bytes_per_s=1.5e10,
    measured_at="2026-01-02T03:04:05Z",
    conditions={"torch": "2.13.0"},
)


def test_stored_and_loaded(tmp_path: Path) -> None:
    key = (RECORD.device, RECORD.dtype, RECORD.threads)
    assert load_calibration(*key, cache=tmp_path) == (None, None)
    file = store_calibration(RECORD, cache=tmp_path)
    assert load_calibration(*key, cache=tmp_path) == (RECORD, None)
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    assert load_calibration(RECORD.device, "bfloat16", 2, cache=tmp_path) == (None, None)
    assert load_calibration(RECORD.device, "float32", 1, cache=tmp_path) == (None, None)


def test_the_users_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    assert store_calibration(RECORD).is_relative_to(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff", '{"device": 1}'])
def test_a_damaged_file_is_warned_of_and_not_used(tmp_path: Path, content: str) -> None:
    file = store_calibration(RECORD, cache=tmp_path)
    file.write_text(content)
    found, warning = load_calibration(RECORD.device, "float32", 2, cache=tmp_path)
    assert found is None and warning and str(file) in warning


def test_a_file_of_another_device(tmp_path: Path) -> None:
    file = store_calibration(RECORD, cache=tmp_path)
    other = calibration_file("Other", "float32", 2, cache=tmp_path)
    file.rename(other)
    found, warning = load_calibration("Other", "float32", 2, cache=tmp_path)
    assert found is None and warning and "another device" in warning


def test_names_that_are_plain_alike_do_not_meet(tmp_path: Path) -> None:
    names = ["AMD EPYC (TM)", "AMD EPYC TM", "amd epyc tm", "../../etc", "", "é" * 300]
    files = {calibration_file(name, "float32", 1, cache=tmp_path) for name in names}
    assert len(files) == len(names)
    assert all(file.parent == tmp_path / "calibration" for file in files)


def test_impossible_peaks_are_refused() -> None:
    for change in ({"flops_per_s": 0}, {"bytes_per_s": float("nan")}, {"threads": 0}):
        with pytest.raises(ValidationError):
            Calibration.model_validate({**RECORD.model_dump(), **change})
