"""The door with a runner of known times: utilization is arithmetic, and is never clamped."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import UsageError
from infopt.core.profiling import peaks as peaks_module
from infopt.core.profiling.peaks import KnownPeaks
from infopt.core.profiling.plan import plan_profile
from infopt.core.profiling.profile import profile
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.serve import EngineSettings
from infopt.core.reports.profile import Peaks, ProfileReport
from infopt.core.reports.store import to_json
from infopt.core.runtime.phases import PhaseRunner

PEAKS = Peaks(
    device="a chip", dtype="float32", threads=1, flops_per_s=1e12, bytes_per_s=1e11,
    measured_at="2026-01-01T00:00:00+00:00", conditions={},
)  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return read_artifact(folder)


class FakeRunner:
    """Sleeps instead of computing, and remembers what it was asked."""

    dtype = "float32"

    def __init__(self, weight_bytes: int, seconds: float = 0.01) -> None:
        self.weight_bytes = weight_bytes
        self.seconds = seconds
        self.asked: list[tuple[Any, ...] | str] = []

    def replayed_times(self) -> None:
        return None

    def instrument(self, wrap: Any) -> None:
        self.asked.append("clocks off" if wrap is None else "clocks on")

    def prefill(self, batch: int, tokens: int) -> None:
        self.asked.append(("prefill", batch, tokens))
        time.sleep(self.seconds)

    def prepare_decode(self, batch: int, context: int) -> None:
        self.asked.append(("prepare", batch, context))

    def decode_step(self) -> None:
        self.asked.append(("step",))
        time.sleep(self.seconds)


def read_weights(artifact: Artifact) -> int:
    """What a step of the float32 model reads: all but the embedding table, which is not tied."""
    return artifact.weight_bytes - 500 * 64 * 4


def settings(**values: Any) -> ProfileSettings:
    defaults = {"prompt_tokens": 40, "output_tokens": 8, "repeats": 3, "batch": 2}
    return ProfileSettings.model_validate(defaults | {"device": "cpu", "dtype": "float32"} | values)


def measured(artifact: Artifact, **values: Any) -> tuple[ProfileReport, FakeRunner]:
    runner = FakeRunner(read_weights(artifact))
    return profile(artifact, settings(**values), runner, peaks=PEAKS), runner


def test_static_alone(artifact: Artifact) -> None:
    report = profile(artifact, settings())
    assert report.prefill is report.decode is report.peaks is None
    assert report.static.parameters == artifact.summary().parameters
    assert report.static.weight_bytes == artifact.weight_bytes
    assert report.static.context == 48
    assert report.static.kv_bytes == 2 * 48 * 2 * 3 * 2 * 8 * 4
    assert report.static.memory.total == report.static.memory_bytes
    assert report.static.fits and report.static.largest_batch >= 2
    assert report.provenance["static.memory.reserve"] == "assumed"


def test_both_phases_carry_both_metrics(artifact: Artifact) -> None:
    report, runner = measured(artifact, mfu=True, mbu=True)
    for phase, cost in (
        (report.prefill, report.static.prefill),
        (report.decode, report.static.decode),
    ):
        assert phase is not None
        assert 0.01 <= phase.seconds_min <= phase.seconds
        assert (phase.tokens, phase.flops, phase.bytes) == (cost.tokens, cost.flops, cost.bytes)
        assert phase.flops_per_s == pytest.approx(cost.flops / phase.seconds)
        assert phase.mfu == pytest.approx(cost.flops / phase.seconds / 1e12)
        assert phase.mbu == pytest.approx(cost.bytes / phase.seconds / 1e11)
        assert phase.tokens_per_s == pytest.approx(cost.tokens / phase.seconds)
        assert phase.roofline_seconds == max(cost.flops / 1e12, cost.bytes / 1e11)
    assert report.decode is not None and report.decode.tokens == 2
    assert runner.asked == [
        *[("prefill", 2, 40)] * (1 + 3),
        *["clocks on", ("prefill", 2, 40), *[("prefill", 2, 40)] * 2, "clocks off"],
        ("prepare", 2, 48),
        *[("step",)] * (3 + 8),
        *["clocks on", ("prepare", 2, 48), ("step",), *[("step",)] * 8, "clocks off"],
    ]
    assert report.warnings == ()
    assert report.provenance["decode"] == "measured"
    assert report.provenance["decode.roofline_seconds"] == "computed"
    assert report.provenance["peaks"] == "calibrated"


def test_only_what_is_asked_is_measured(artifact: Artifact) -> None:
    report, runner = measured(artifact, mfu=True)
    assert report.decode is None and report.prefill is not None and report.peaks == PEAKS
    assert {ask[0] for ask in runner.asked if isinstance(ask, tuple)} == {"prefill"}
    report, runner = measured(artifact, mbu=True)
    assert report.prefill is None and report.decode is not None
    assert {ask[0] for ask in runner.asked if isinstance(ask, tuple)} == {"prepare", "step"}


def test_json_has_the_keys_that_scripts_rely_on(artifact: Artifact) -> None:
    text = to_json(measured(artifact, mfu=True, mbu=True)[0])
    read = ProfileReport.model_validate_json(text)
    assert read.prefill is not None and read.prefill.mfu > 0
    assert read.decode is not None and read.decode.mbu > 0
    assert read.peaks is not None and read.peaks.bytes_per_s == 1e11


def test_an_impossible_time_is_shown_and_warned_of(artifact: Artifact) -> None:
    runner = FakeRunner(read_weights(artifact), seconds=0.0)
    slow = PEAKS.model_copy(update={"flops_per_s": 1e3, "bytes_per_s": 1e3})
    report = profile(artifact, settings(mfu=True, mbu=True), runner, peaks=slow)
    assert report.prefill is not None and report.decode is not None
    assert report.prefill.mfu > 1 and report.decode.mbu > 1
    for metric in ("prefill.mfu", "prefill.mbu", "decode.mfu", "decode.mbu"):
        assert any(warning.startswith(f"{metric} is ") for warning in report.warnings)


def test_stored_peaks_that_are_passed_are_measured_again(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Peaks | None] = []
    slow = PEAKS.model_copy(update={"flops_per_s": 1e3, "bytes_per_s": 1e3})

    def known(*_: Any, at_least: Peaks | None = None, **__: Any) -> KnownPeaks:
        asked.append(at_least)
        return KnownPeaks(PEAKS, "measured") if at_least else KnownPeaks(slow, "calibrated")

    monkeypatch.setattr(peaks_module, "device_peaks", known)
    runner = FakeRunner(read_weights(artifact))
    report = profile(artifact, settings(mfu=True, mbu=True), runner)
    assert asked == [None, slow]
    assert report.peaks == PEAKS and report.provenance["peaks"] == "measured"
    assert report.warnings == ()


def test_the_runtimes_own_bytes_count(artifact: Artifact) -> None:
    runner = FakeRunner(2 * read_weights(artifact))
    report = profile(artifact, settings(mbu=True), runner, peaks=PEAKS)
    assert report.decode is not None
    extra = report.decode.bytes - report.static.decode.bytes
    assert extra == read_weights(artifact)
    assert "holds them in another form" in report.warnings[0]


def test_unsteady_runs_are_told(artifact: Artifact) -> None:
    runner = FakeRunner(read_weights(artifact))
    steps = iter([0.0, 0.0, 0.0, 0.001, *[0.02] * 20])
    runner.decode_step = lambda: time.sleep(next(steps))  # type: ignore[method-assign]
    report = profile(artifact, settings(mbu=True), runner, peaks=PEAKS)
    assert "times the fastest" in report.warnings[0]


def test_a_context_beyond_the_positions_is_refused(artifact: Artifact) -> None:
    assert profile(artifact, settings(prompt_tokens=248)).static.context == 256
    for door in (profile, plan_profile):
        with pytest.raises(UsageError, match=r"249 prompt and 8 output tokens exceed .* 256"):
            door(artifact, settings(prompt_tokens=249))


def test_the_runtime_is_a_runner(artifact: Artifact) -> None:
    """The real one reads the bytes that the static profile says."""
    runner = PhaseRunner(artifact, EngineSettings(device="cpu", dtype="float32"))
    assert runner.weight_bytes == read_weights(artifact)
    report = profile(artifact, settings(mfu=True, mbu=True), runner, peaks=PEAKS)
    assert report.prefill is not None and report.decode is not None
    assert report.prefill.bytes == report.static.prefill.bytes
    assert not any("another form" in warning for warning in report.warnings)


def test_static_imports_no_torch(artifact: Artifact, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from infopt.core.artifact.read import read_artifact
from infopt.core.profiling.plan import plan_profile
from infopt.core.profiling.profile import profile
from infopt.core.recipe.profile import ProfileSettings
artifact = read_artifact(Path({str(artifact.path)!r}))
profile(artifact, ProfileSettings(device="cpu", prompt_tokens=40))
plan_profile(artifact, ProfileSettings(device="cpu", prompt_tokens=40, mfu=True))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_plan(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    alone = plan_profile(artifact, settings())
    assert len(alone.actions) == 1 and alone.seconds == 0
    both = plan_profile(artifact, settings(mfu=True, mbu=True))
    assert both.actions[1] == "run 4 prefills of 2 x 40 tokens"
    assert both.actions[2] == "run 11 decode steps of 2 x 1 token"
    assert "measured now and stored" in both.actions[3]
    assert both.seconds is None
    assert both.memory_bytes > artifact.weight_bytes
