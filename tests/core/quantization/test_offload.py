"""A quantization whose hidden states lie on disk: nothing of it shows in what is made."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from infopt.core.artifact.read import Artifact
from infopt.core.compression import walk as walking
from infopt.core.errors import NumericsError
from infopt.core.models.hf import blocks
from infopt.core.progress import Progress
from infopt.core.quantization.job import resolve_job
from infopt.core.quantization.plan import plan_quantize
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings

MakeLlama = Callable[..., Artifact]


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 16, "sequence_length": 32}
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu", "group_size": 32}
    return QuantizeSettings.model_validate(values | changes)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def states(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.name.startswith("states-")]


CASES: list[dict[str, Any]] = [
    {},
    {"gptaq": 0.25},
    {"method": "autoround", "iterations": 2},
    {"method": "smoothquant", "group_size": "auto"},
    {"method": "rtn", "kv_cache": "int8", "bits": 4},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_artifact_is_that_of_a_run_in_memory(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    source = make_llama()
    seen: list[Path] = []

    def look(_: Progress) -> None:
        seen.extend(states(tmp_path))

    for where in ("memory", "disk"):
        wanted = settings(calibration_file, offload=where, **case)
        assert resolve_job(source, wanted).offloaded == (where == "disk")
        quantize(source, tmp_path / where, wanted, progress=look)
    assert content(tmp_path / "disk") == content(tmp_path / "memory")
    assert not seen and not states(tmp_path) and not list(tmp_path.glob(".*"))


def test_an_interrupt_leaves_no_states_and_is_continued_from_either(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama(num_hidden_layers=3)
    quantize(source, tmp_path / "whole", settings(calibration_file, offload="memory"))

    def stop(progress: Progress) -> None:
        if progress.note.startswith("block 3 ") and progress.done % 7 == 3:
            raise KeyboardInterrupt

    for first, second in (("disk", "memory"), ("memory", "disk"), ("disk", "disk")):
        out = tmp_path / f"{first}-{second}"
        with pytest.raises(KeyboardInterrupt):
            quantize(source, out, settings(calibration_file, offload=first), progress=stop)
        assert not states(tmp_path)
        wanted = settings(calibration_file, offload=second)
        assert quantize(source, out, wanted, resume=True).resumed_blocks == 2
        assert content(out) == content(tmp_path / "whole")
        assert not list(tmp_path.glob(".*"))


def test_a_failure_leaves_nothing(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise NumericsError("something is not finite")

    monkeypatch.setattr("infopt.core.quantization.walked.quantize_block", broken)
    with pytest.raises(NumericsError):
        quantize(make_llama(), tmp_path / "out", settings(calibration_file, offload="disk"))
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_the_plan_counts_the_states_where_they_are(
    make_llama: MakeLlama, calibration_file: Path
) -> None:
    source = make_llama()

    def plan(where: str) -> Any:
        wanted = settings(calibration_file, offload=where)
        many = wanted.calibration.model_copy(update={"samples": 6400})
        return plan_quantize(source, wanted.model_copy(update={"calibration": many}))

    memory, disk = plan("memory"), plan("disk")
    nbytes = 6400 * 32 * 64 * 4
    assert memory.memory_bytes - disk.memory_bytes > nbytes
    assert disk.disk_bytes - memory.disk_bytes == pytest.approx(nbytes, rel=0.01)
    told = [action for action in disk.actions if "on disk" in action]
    assert len(told) == 1 and f"{nbytes / 2**20:.0f} MiB" in told[0]
    assert not any("on disk" in action for action in memory.actions)


def test_one_block_of_weights_is_in_memory_at_a_time(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many there are: that is what lets a model be larger than memory."""
    loaded: list[int] = []
    plain = walking.materialize

    def counted(model: Any, name: str, part: nn.Module, *args: Any, **options: Any) -> None:
        plain(model, name, part, *args, **options)
        loaded.append(sum(holds(block.parameters()) for _, block in blocks(model)))

    monkeypatch.setattr(walking, "materialize", counted)
    source = make_llama(num_hidden_layers=5)
    quantize(source, tmp_path / "out", settings(calibration_file, offload="disk"))
    assert len(loaded) > 10 and max(loaded) == 1


def holds(parameters: Iterable[nn.Parameter]) -> bool:
    return any(not parameter.is_meta for parameter in parameters)
