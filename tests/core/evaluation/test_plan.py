"""The plan refuses what the door would refuse, without torch."""

import pytest

from infopt.core.errors import UsageError
from infopt.core.evaluation.plan import plan_evaluate, protocol
from infopt.core.hardware.calibration import Calibration, store_calibration
from infopt.core.hardware.probe import probe
from infopt.core.recipe.evaluate import EvaluateSettings


def test_memory_holds_both_models(make_artifact) -> None:
    artifact, baseline = make_artifact("one"), make_artifact("two")
    settings = EvaluateSettings(context=64, dtype="float32", device="cpu")
    alone = plan_evaluate(artifact, settings)
    both = plan_evaluate(artifact, settings, baseline)
    parameters = artifact.summary().parameters
    assert both.memory_bytes - alone.memory_bytes == 4 * (parameters + 64 * 256)
    assert "load one and two on cpu in float32" in both.actions[0]
    named = plan_evaluate(artifact, settings.model_copy(update={"baseline": "default"}))
    assert named.memory_bytes == both.memory_bytes


def test_time_is_told_where_the_device_is_calibrated(make_artifact, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "cache"))
    artifact = make_artifact("one")
    settings = EvaluateSettings(context=64, tokens=1000, dtype="float32", device="cpu")
    assert plan_evaluate(artifact, settings).seconds is None
    machine = probe()
    store_calibration(
        Calibration(
            device=machine.cpu,
            dtype="float32",
            threads=machine.physical_cores,
            flops_per_s=1e9,
            bytes_per_s=1e9,
            measured_at="2026-01-01T00:00:00+00:00",
        )
    )
    expected = 2 * artifact.summary().parameters * 1000 / 0.4e9
    assert plan_evaluate(artifact, settings).seconds == pytest.approx(expected)


def test_a_bound_needs_a_baseline(make_artifact) -> None:
    settings = EvaluateSettings(context=64, max_ppl_increase="2%")
    with pytest.raises(UsageError, match="needs a baseline"):
        plan_evaluate(make_artifact("one"), settings)


def test_a_context_beyond_the_positions_is_refused(make_artifact) -> None:
    with pytest.raises(UsageError, match="one has 128 positions, too few for a context of 256"):
        plan_evaluate(make_artifact("one"), EvaluateSettings(context=256))


def test_a_stride_that_skips_tokens_is_refused(make_artifact) -> None:
    with pytest.raises(UsageError, match="a stride of 65 skips tokens between windows of 64"):
        plan_evaluate(make_artifact("one"), EvaluateSettings(context=64, stride=65))


def test_the_protocol_is_said_in_words() -> None:
    assert "windows of 1024 tokens that do not overlap" in protocol(EvaluateSettings())
    assert "512 apart" in protocol(EvaluateSettings(stride=512))
