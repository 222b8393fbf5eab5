import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infopt.core.artifact.read import Artifact
from infopt.core.errors import ResourceError, UsageError
from infopt.core.quantization.job import resolve_job
from infopt.core.quantization.plan import check_disk, plan_quantize
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings


def test_a_plan_tells_what_it_takes(make_llama: Callable[..., Artifact]) -> None:
    found = plan_quantize(make_llama(), QuantizeSettings(device="cpu", dtype="float32"))
    assert found.command == "quantize"
    assert "14 linear layers in 2 blocks to int4 g64 sym" in found.actions[0]
    assert found.memory_bytes > 0 and found.seconds is not None and found.seconds > 0


def test_more_work_is_planned_to_take_longer(make_llama: Callable[..., Artifact]) -> None:
    artifact = make_llama()
    few, many = (
        plan_quantize(
            artifact,
            QuantizeSettings.model_validate(
                {"device": "cpu", "dtype": "float32", "calibration": {"samples": samples}}
            ),
        )
        for samples in (64, 6400)
    )
    assert few.seconds is not None and many.seconds is not None
    assert many.seconds > 10 * few.seconds
    assert many.disk_bytes > few.disk_bytes and many.memory_bytes > few.memory_bytes


def test_disk_covers_what_is_written(
    make_llama: Callable[..., Artifact], calibration_file: Path, tmp_path: Path
) -> None:
    artifact = make_llama()
    settings = QuantizeSettings.model_validate(
        {"device": "cpu", "dtype": "float32", "method": "rtn"}
        | {"calibration": {"text": str(calibration_file), "samples": 4, "sequence_length": 32}}
    )
    report = quantize(artifact, tmp_path / "out", settings)
    assert report.bytes <= plan_quantize(artifact, settings).disk_bytes <= 4 * report.bytes


def test_a_full_disk_is_told_before_the_work(
    make_llama: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    job = resolve_job(make_llama(), QuantizeSettings(device="cpu"))
    with pytest.raises(ResourceError, match="of disk"):
        check_disk(job, tmp_path / "deep" / "out")


def test_a_plan_refuses_what_the_work_would(make_llama: Callable[..., Artifact]) -> None:
    with pytest.raises(UsageError, match="128 does not divide"):
        plan_quantize(make_llama(), QuantizeSettings(group_size=128, device="cpu"))
