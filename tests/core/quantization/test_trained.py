"""QAT through the door: what is learned is what is written, and interrupted work continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ResumeError
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.progress import Progress
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings

MakeLlama = Callable[..., Artifact]


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 4, "sequence_length": 32}
    values = {
        "method": "qat",
        "calibration": calibration,
        "dtype": "float32",
        "device": "cpu",
        "group_size": 32,
        "steps": 3,
    }
    return QuantizeSettings.model_validate(values | changes)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 2},
        {"bits": 3, "symmetric": False},
        {"bits": 4, "group_size": "channel"},
        {"bits": 4, "format": "compressed-tensors"},
        {"bits": 8, "grid": "minmax"},
    ],
    ids=str,
)
def test_what_was_learned_is_what_is_written(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, **changes)
    report = quantize(source, tmp_path / "out", wanted)
    assert report.logits_max_difference <= 1e-4 and len(report.layers) == 14
    written = read_artifact(tmp_path / "out")
    size = None if changes.get("group_size") == "channel" else 32
    form = IntegerFormat(changes["bits"], changes.get("symmetric", True), size)
    for row in report.layers:
        weight = linear_weight(written, row.name)
        assert isinstance(weight, QuantizedWeight) and weight.format == form
        assert row.fallback is None and 0 < row.error < 1
    norms = [name for name in source.names() if name.endswith("norm.weight")]
    assert any(not torch.equal(written.tensor(n), source.tensor(n)) for n in norms), "they learn"
    assert all(written.dtype(name) == source.dtype(name) for name in norms)
    name = "model.embed_tokens.weight"
    assert torch.equal(written.tensor(name), source.tensor(name)), "embeddings stay"
    assert not written.has("lm_head.weight")


def test_steps_and_their_size_change_what_is_learned(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "again": {},
        "longer": {"steps": 6},
        "faster": {"learning_rate": 0.5},
        "other text": {"seed": 1},
    }
    for name, changes in cases.items():
        quantize(source, tmp_path / name, settings(calibration_file, **changes))
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in cases}
    assert files["plain"] == files["again"]
    assert len(set(files.values())) == len(cases) - 1


def stop(stage: str, done: int, note: str = "") -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= done and note in progress.note:
            raise KeyboardInterrupt

    return callback


STOPS: dict[str, tuple[Callable[[Progress], None], int | None]] = {
    "among the codes to begin at": (stop("quantizing layers", 10, "block 2"), 0),
    "before the first step": (stop("training", 0), 0),
    "before anything was kept": (stop("training", 30), 0),
    "in training": (stop("training", 52), 50),
    "at the comparison": (stop("comparing with what was written", 0), None),
}
"""And the step at which the training goes on, where one can tell."""


@pytest.mark.parametrize("where", STOPS)
def test_an_interrupted_training_continues_to_the_same_bytes(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, where: str
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, bits=2, steps=55)
    whole = quantize(source, tmp_path / "whole", wanted)
    out = tmp_path / "out"
    callback, kept = STOPS[where]
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, wanted, progress=callback)
    assert not out.exists()
    with pytest.raises(ResumeError, match="setting steps"):
        quantize(source, out, settings(calibration_file, bits=2, steps=54), resume=True)
    seen: list[Progress] = []
    report = quantize(source, out, wanted, resume=True, progress=seen.append)
    training = [p for p in seen if p.stage == "training"]
    if kept is not None:
        assert (training[0].done, training[0].resumed) == (kept, kept)
    solved = [p for p in seen if p.stage == "quantizing layers"]
    assert bool(solved) == (where == "among the codes to begin at"), "codes are solved for once"
    assert content(out) == content(tmp_path / "whole")
    assert [row.error for row in report.layers] == [row.error for row in whole.layers]
    assert not list(tmp_path.glob(".out*"))


def test_training_begins_at_the_codes_of_gptq(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    """At a rate that moves nothing, they are what is written."""
    source = make_llama()
    still = settings(calibration_file, bits=3, steps=1, learning_rate=1e-9)
    quantize(source, tmp_path / "qat", still)
    plain = {"method": "gptq", "bits": 3, "group_size": 32, "dtype": "float32", "device": "cpu"}
    gptq = QuantizeSettings.model_validate(plain | {"calibration": still.calibration})
    quantize(source, tmp_path / "gptq", gptq)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("qat", "gptq"))
    codes = [name for name in one if name.endswith("qweight")]
    assert len(codes) == 14
    assert all(torch.equal(one[name], other[name]) for name in codes)
