"""`--analyze` as a door: what is measured, allocated and left on disk (nothing)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infopt.core.artifact.read import Artifact
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.progress import Progress
from infopt.core.quantization.allocate import allocate, mean_bits, predicted_kl
from infopt.core.quantization.analyze import analyze, plan_analyze
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings

MakeLlama = Callable[..., Artifact]


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 16, "sequence_length": 32}
    values = {
        "calibration": calibration,
        "dtype": "float32",
        "device": "cpu",
        "group_size": 32,
        "target_bits": 3.5,
        "mixed_bits": (2, 4, 8),
    }
    merged = {key: value for key, value in (values | changes).items() if value is not None}
    return QuantizeSettings.model_validate(merged)


def test_every_unit_is_measured_at_every_width_and_nothing_is_written(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source, wanted = make_llama(), settings(calibration_file)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    seen: list[Progress] = []
    report = analyze(source, wanted, progress=seen.append)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    pairs = [(row.unit, row.bits) for row in report.sensitivity]
    assert len(pairs) == len(set(pairs)) == 8 * 3 and {bits for _, bits in pairs} == {2, 4, 8}
    named = {layer for row in report.sensitivity for layer in row.layers}
    assert len(named) == 14
    for row in report.sensitivity:
        shapes = [source.shape(f"{layer}.weight") for layer in row.layers]
        assert row.parameters == sum(rows * columns for rows, columns in shapes)
        assert row.kl >= 0
    kl = {(row.unit, row.bits): row.kl for row in report.sensitivity}
    units = {unit for unit, _ in pairs}
    assert all(kl[unit, 2] > kl[unit, 4] > kl[unit, 8] for unit in units)
    assert report.calibration_tokens == 16 * 32 and report.seconds > 0
    assert report.model == source.summary() and report.command == "quantize"
    measured = [p for p in seen if p.stage == "measuring sensitivity"]
    assert [p.done for p in measured] == list(range(24)) and {p.total for p in measured} == {24}


def test_the_allocation_is_what_the_target_would_give(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source, wanted = make_llama(), settings(calibration_file)
    report = analyze(source, wanted)
    found = report.allocation
    assert found is not None and found.target_bits == 3.5
    assert found.bits == allocate(report.sensitivity, 3.5)
    assert found.mean_bits == mean_bits(report.sensitivity, found.bits) <= 3.5
    assert found.predicted_kl == predicted_kl(report.sensitivity, found.bits)
    done = quantize(source, tmp_path / "out", wanted).allocation
    assert done == found, "the quantization itself allocates the same"


def test_a_bound_gives_an_allocation_too(make_llama: MakeLlama, calibration_file: Path) -> None:
    wanted = settings(calibration_file, target_bits=None, max_ppl_increase="0.1%")
    report = analyze(make_llama(), wanted)
    assert report.allocation is not None and report.allocation.max_ppl_increase == 0.001
    assert report.allocation.predicted_kl <= 0.001
    assert report.allocation.measured_ppl_increase is None, "nothing was measured of it"


def test_at_most_as_many_tokens_as_it_takes(make_llama: MakeLlama, calibration_file: Path) -> None:
    text = {"text": str(calibration_file), "samples": 64, "sequence_length": 64}
    report = analyze(make_llama(), settings(calibration_file, calibration=text))
    assert report.calibration_tokens == 1024


def test_equal_settings_measure_the_same(make_llama: MakeLlama, calibration_file: Path) -> None:
    source = make_llama()
    one, again, other = (
        analyze(source, settings(calibration_file, **changes)).sensitivity
        for changes in ({}, {}, {"grid": "minmax"})
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"group_size": 128}, UsageError, "128 does not divide"),
        ({"ignore": ("nonsense",)}, UsageError, "nonsense"),
        ({"format": "awq"}, UnsupportedError, "awq has integers of 4 bits"),
    ],
    ids=str,
)
def test_what_the_quantization_would_refuse_is_refused_before_any_work(
    make_llama: MakeLlama,
    calibration_file: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    source, wanted = make_llama(), settings(calibration_file, **changes)
    seen: list[Progress] = []
    with pytest.raises(error, match=words):
        analyze(source, wanted, progress=seen.append)
    assert not seen
    with pytest.raises(error, match=words):
        plan_analyze(source, wanted)


def test_weights_that_are_not_finite_are_named(
    make_llama: MakeLlama, calibration_file: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from infopt.core.artifact.read import read_artifact

    source = make_llama()
    tensors = load_file(source.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    save_file(tensors, source.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers\.1"):
        analyze(read_artifact(source.path), settings(calibration_file))


def test_the_plan_reads_no_weights(make_llama: MakeLlama, calibration_file: Path) -> None:
    source = make_llama()
    (source.path / "tokenizer.json").unlink()
    plan = plan_analyze(source, settings(calibration_file))
    assert "14 layers" in plan.actions[0] and "2, 4, 8 bits" in plan.actions[0]
    assert plan.memory_bytes and plan.memory_bytes > source.weight_bytes
