from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UnsupportedError
from infopt.core.models.decoder import StepInputs
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime import model_runner
from infopt.core.runtime.phases import PhaseRunner


@pytest.fixture
def phases(tiny_reference: tuple[Artifact, Any]) -> PhaseRunner:
    return PhaseRunner(
        tiny_reference[0], EngineSettings(dtype="float32", device="cpu", block_size=4)
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepInputs, Tensor]]:
    """The inputs and logits of every step."""
    steps: list[tuple[StepInputs, Tensor]] = []
    run = model_runner.ModelRunner.run

    def spy(
        self: model_runner.ModelRunner, inputs: StepInputs, rows: Tensor | None = None
    ) -> Tensor:
        logits = run(self, inputs, rows)
        steps.append((inputs, logits))
        return logits

    monkeypatch.setattr(model_runner.ModelRunner, "run", spy)
    return steps


def test_prefill_computes_every_token_and_the_logits_of_the_last(
    phases: PhaseRunner, seen: list[tuple[StepInputs, Tensor]]
) -> None:
    phases.prefill(3, 10)
    phases.prefill(2, 1)
    (first, logits), (second, single) = seen
    assert first.token_ids.shape == (30,) and logits.shape == (3, 97)
    assert first.positions.tolist() == list(range(10)) * 3
    assert len(set(first.slots.tolist())) == 30
    assert second.token_ids.shape == (2,) and single.shape == (2, 97)


def test_a_decode_step_reads_the_whole_context(
    phases: PhaseRunner, seen: list[tuple[StepInputs, Tensor]]
) -> None:
    phases.prepare_decode(2, 17)
    for _ in range(3):
        phases.decode_step()
    for inputs, logits in seen:
        assert inputs.positions.tolist() == [16, 16]
        (reads,) = inputs.plan.reads().decodes
        assert len(set(reads.slots.tolist())) == 2 * 17
        assert logits.shape == (2, 97) and bool(torch.isfinite(logits).all())


def test_bytes_and_dtype(phases: PhaseRunner, tiny_reference: tuple[Artifact, Any]) -> None:
    stored = sum(parameter.nbytes for parameter in tiny_reference[1].parameters())
    assert phases.resident_bytes == stored
    assert phases.weight_bytes == stored - 97 * 32 * 4
    assert phases.dtype == "float32"


def test_decode_needs_a_cache(phases: PhaseRunner) -> None:
    with pytest.raises(AssertionError):
        phases.decode_step()


def test_a_replayed_step_tells_what_its_parts_take(
    tiny_reference: tuple[Artifact, Any],
) -> None:
    try:
        settings = EngineSettings(dtype="float32", device="cpu", block_size=4, kernels="native")
        phases = PhaseRunner(tiny_reference[0], settings)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert phases.replayed_times() is None
    for step in (lambda: phases.prefill(2, 9), lambda: phases.decode_step()):
        if phases.replayed_times() is not None:
            phases.prepare_decode(2, 17)
        step()
        times = phases.replayed_times()
        assert times is not None and len(times.layers) == 2
        assert {"embedding", "norms", "qkv", "attention", "o", "gate_up", "activation", "down",
                "lm_head"} == set(times.operators)  # fmt: skip
    phases.instrument(lambda decoder: replace(decoder))
    phases.prefill(2, 9)
    assert phases.replayed_times() is None, "clocks are in the decoder"


def test_torchs_kernels_are_not_replayed(tiny_reference: tuple[Artifact, Any]) -> None:
    settings = EngineSettings(dtype="float32", device="cpu", block_size=4, kernels="torch")
    phases = PhaseRunner(tiny_reference[0], settings)
    phases.prefill(2, 9)
    assert phases.replayed_times() is None
