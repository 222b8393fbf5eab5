"""A rotation before the rounding, through the door: kept by `resume`, told, and all or nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.errors import UnsupportedError
from infopt.core.progress import Progress
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.recipe import load_recipe

MakeLlama = Callable[..., Artifact]


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 16, "sequence_length": 32}
    values = {
        "method": "rotate",
        "calibration": calibration,
        "dtype": "float32",
        "device": "cpu",
    }
    return QuantizeSettings.model_validate(values | changes)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def stop(when: Callable[[Progress], bool]) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if when(progress):
            raise KeyboardInterrupt

    return callback


STOPS: dict[str, Callable[[Progress], bool]] = {
    "in the rotation": lambda p: p.stage == "rotating" and p.done == 5,
    "at its comparison": lambda p: p.stage.startswith("computing the rotated"),
    "after the rotation": lambda p: p.stage.startswith("embedding"),
    "in the second block": lambda p: p.note == "block 2 of 2" and p.done == 9,
    "at the writing": lambda p: p.stage == "writing",
}


@pytest.mark.parametrize("where", STOPS)
@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "W4A8-int8"},
        {"scheme": "W4A16"},
        {"scheme": "W4A4-int4", "rounding": "rtn"},
    ],
    ids=lambda c: str(c["scheme"]),
)
def test_an_interrupted_run_continues_to_the_same_bytes(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    where: str,
    changes: dict[str, Any],
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, **changes)
    quantize(source, tmp_path / "whole", wanted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, wanted, progress=stop(STOPS[where]))
    assert not out.exists()
    seen: list[Progress] = []
    report = quantize(source, out, wanted, resume=True, progress=seen.append)
    again = where in ("in the rotation", "at its comparison")
    assert any(p.stage == "rotating" for p in seen) == again, "a rotation that is done is kept"
    assert report.resumed_blocks == {"in the second block": 1, "at the writing": 2}.get(where, 0)
    assert content(out) == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_rotated_and_left_dense_it_is_the_same_function(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, scheme="W16A16", seed=3)
    report = quantize(source, tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    verify_manifest(written.path)
    assert (report.method, report.scheme, report.format) == ("rotate", "W16A16", None)
    assert report.layers == () and report.bits is None and report.allocation is None
    assert written.quantization is None and report.bytes == written.weight_bytes
    assert 0 < report.logits_max_difference < 0.05, "weights are rounded to bfloat16 again"
    step = load_recipe(written.path / "recipe.yaml").steps[0]
    assert step.settings == wanted
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (written.path, source.path)
        )
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_the_seed_chooses_the_rotation(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        wanted = settings(calibration_file, scheme="W16A16", seed=seed)
        quantize(source, tmp_path / name, wanted)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("scheme", ["W16A16", "W8A8-int8"])
def test_a_head_that_comes_apart_is_told(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, scheme: str
) -> None:
    for name, tied in (("tied", True), ("untied", False)):
        source = make_llama(name, tie_word_embeddings=tied)
        wanted = settings(calibration_file, scheme=scheme)
        report = quantize(source, tmp_path / f"{name}-out", wanted)
        told = [w for w in report.warnings if "the head shared the embedding's weight" in w]
        assert len(told) == tied
        assert read_artifact(tmp_path / f"{name}-out").has("lm_head.weight")


def test_the_report_is_of_the_model_that_was_given(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, scheme="W4A8-int8")
    report = quantize(source, tmp_path / "out", wanted)
    assert report.model == source.summary() and report.original_bytes == source.weight_bytes
    assert len(report.layers) == 14 and report.calibration_tokens == 16 * 32
    written = read_artifact(tmp_path / "out")
    for name in written.names():
        if name.endswith("norm.weight"):
            assert bool((written.tensor(name) == 1).all()), "gains are folded into the layers"


def test_what_cannot_be_rotated_is_refused_before_any_work(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    from transformers.models.opt import OPTConfig, OPTForCausalLM

    folder = make_llama("opt").path
    (folder / "model.safetensors").unlink()
    config = OPTConfig(
        vocab_size=256,
        hidden_size=64,
        ffn_dim=96,
        word_embed_proj_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    seen: list[Progress] = []
    before = set(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        quantize(
            read_artifact(folder),
            tmp_path / "out",
            settings(calibration_file),
            progress=seen.append,
        )
    assert not seen and set(tmp_path.iterdir()) == before
