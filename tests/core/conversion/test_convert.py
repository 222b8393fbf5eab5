"""From every format into every other: the same values, or the reason why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.conversion import convert as door
from infopt.core.conversion.convert import convert
from infopt.core.errors import InfoptError, NumericsError, UnsupportedError, UsageError
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.recipe.convert import ConvertSettings

Open = Callable[[str], Artifact]
FORMATS = ("gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes")
INTEGERS = ("gptq", "awq", "compressed-tensors")
HELD: dict[str, tuple[str, ...]] = {
    "gptq-act-order": ("gptq",),
    "gptq-asym": INTEGERS,
    "awq": INTEGERS,
    "awq-zero-point": INTEGERS,
    "ct-w4a16": INTEGERS,
    "ct-w4a16-asym": INTEGERS,
    "ct-w4a16-gptq": INTEGERS,
    "ct-w8a8": ("compressed-tensors",),
    "ct-fp8": ("compressed-tensors",),
    "ct-fp8-dynamic": ("compressed-tensors",),
    "ct-fp8-block": ("compressed-tensors", "fp8"),
    "ct-kv-fp8": ("compressed-tensors",),
    "bnb-int8": ("bitsandbytes",),
    "bnb-nf4": ("bitsandbytes",),
}
"""Which formats hold what the other tools wrote."""
LAYER = "model.layers.1.mlp.down_proj"


def settings(format: str, **more: Any) -> ConvertSettings:
    return ConvertSettings.model_validate({"format": format, **more})


def weight(artifact: Artifact, layer: str = LAYER) -> Tensor:
    found = linear_weight(artifact, layer)
    return found.float() if isinstance(found, Tensor) else found.dequantize()


def logits(artifact: Artifact) -> Tensor:
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        found: Tensor = load_transformers(artifact, torch.float32, torch.device("cpu"))(ids).logits
    return found


@pytest.mark.parametrize("name", HELD)
def test_what_can_be_held_is_exact_and_what_cannot_is_refused(
    name: str, checkpoint: Open, tmp_path: Path
) -> None:
    source = checkpoint(name)
    expected = logits(source)
    for format in FORMATS:
        output = tmp_path / format
        if format not in HELD[name]:
            with pytest.raises(UnsupportedError) as refused:
                convert(source, output, settings(format))
            assert format in str(refused.value)
            assert not output.exists()
            continue
        report = convert(source, output, settings(format))
        assert report.exact and report.largest_difference == 0.0
        assert report.layers == 14 and sum(report.schemes.values()) == 14
        written = read_artifact(output)
        verify_manifest(output)
        assert written.quantization is not None
        assert written.quantization["quant_method"] == format
        assert report.bytes == written.weight_bytes
        assert torch.equal(weight(written), weight(source))
        assert torch.equal(logits(written), expected)


@pytest.mark.parametrize("name", HELD)
def test_dense_weights_are_exact_in_float32(name: str, checkpoint: Open, tmp_path: Path) -> None:
    source = checkpoint(name)
    report = convert(source, tmp_path / "dense", settings("dense", dense_dtype="float32"))
    assert report.exact and report.dtype == "float32"
    written = read_artifact(tmp_path / "dense")
    assert written.quantization is None and written.config["dtype"] == "float32"
    assert torch.equal(written.tensor(f"{LAYER}.weight"), weight(source))
    told = " ".join(report.warnings)
    assert ("round their inputs" in told) == (name in ("ct-w8a8", "bnb-int8") or "ct-fp8" in name)
    assert ("KV cache" in told) == (name == "ct-kv-fp8")
    assert not [x for x in written.names() if not x.endswith("weight")]


def test_dense_weights_of_16_bits_tell_what_they_lost(checkpoint: Open, tmp_path: Path) -> None:
    source = checkpoint("ct-w4a16-asym")
    report = convert(source, tmp_path / "dense", settings("dense"))
    written = read_artifact(tmp_path / "dense")
    stored = written.tensor(f"{LAYER}.weight")
    assert report.dtype == "bfloat16" and stored.dtype == torch.bfloat16
    assert torch.equal(stored, weight(source).to(torch.bfloat16))
    lost = float((stored.float() - weight(source)).abs().max())
    assert 0 < lost <= report.largest_difference
    assert not report.exact and "rounded to bfloat16" in report.warnings[0]


def changed(
    source: Artifact, folder: Path, change: Callable[[dict[str, Tensor]], None]
) -> Artifact:
    """A copy with other tensors."""
    shutil.copytree(source.path, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return read_artifact(folder)


def test_a_zero_of_0_is_refused_by_gptq_only(checkpoint: Open, tmp_path: Path) -> None:
    def zero(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight_zero_point"].zero_()

    source = changed(checkpoint("ct-w4a16-asym"), tmp_path / "zero", zero)
    with pytest.raises(UnsupportedError, match=f"{LAYER}: .*zero of 0"):
        convert(source, tmp_path / "gptq", settings("gptq"))
    assert not (tmp_path / "gptq").exists()
    assert convert(source, tmp_path / "awq", settings("awq")).exact


def test_scales_that_float16_cannot_hold_are_refused(checkpoint: Open, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        scales = tensors[f"{LAYER}.weight_scale"]
        scales[0, 0] = 2.0**20

    source = changed(checkpoint("ct-w4a16"), tmp_path / "wide", widen)
    with pytest.raises(UnsupportedError, match=f"{LAYER}: .*float16"):
        convert(source, tmp_path / "gptq", settings("gptq"))
    assert convert(source, tmp_path / "awq", settings("awq")).exact, "awq has bfloat16 scales"
    with pytest.raises(NumericsError, match="beyond float16"):
        convert(source, tmp_path / "dense", settings("dense", dense_dtype="float16"))


def test_scattered_groups_are_told_to_loaders(checkpoint: Open, tmp_path: Path) -> None:
    source = checkpoint("gptq-act-order")
    convert(source, tmp_path / "out", settings("gptq"))
    written = read_artifact(tmp_path / "out")
    table = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert written.quantization == table
    assert table["desc_act"] is True
    index = written.tensor(f"{LAYER}.g_idx")
    assert torch.equal(index, source.tensor(f"{LAYER}.g_idx")) and bool((index.diff() < 0).any())


def test_gptq_v2_becomes_v1(checkpoint: Open, tmp_path: Path) -> None:
    def raise_zeros(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):  # eight nibbles a word, none of them 15
                tensors[name] += 0x11111111

    source = changed(checkpoint("gptq-asym"), tmp_path / "v2", raise_zeros)
    for file in ("config.json", "quantize_config.json"):
        table = json.loads((source.path / file).read_text())
        (table.get("quantization_config") or table)["checkpoint_format"] = "gptq_v2"
        (source.path / file).write_text(json.dumps(table))
    source = read_artifact(source.path)
    convert(source, tmp_path / "v1", settings("gptq"))
    v1 = read_artifact(tmp_path / "v1")
    assert torch.equal(weight(v1), weight(checkpoint("gptq-asym")))
    assert v1.quantization is not None and v1.quantization["checkpoint_format"] == "gptq"


def test_what_reads_back_differently_is_not_kept(
    checkpoint: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = door.repacked

    def faulty(artifact: Artifact, layer: str, layout: Any) -> dict[str, Tensor]:
        tensors = honest(artifact, layer, layout)
        if layer == LAYER:
            tensors[f"{layer}.qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(door, "repacked", faulty)
    with pytest.raises(NumericsError, match=LAYER):
        convert(checkpoint("ct-w4a16"), tmp_path / "out", settings("gptq"))
    assert list(tmp_path.iterdir()) == []


def test_layers_left_dense_stay_so(checkpoint: Open, tmp_path: Path) -> None:
    """They are named to loaders, which else would look for codes."""
    name = "model.layers.0.mlp.up_proj"
    source = checkpoint("ct-w4a16")

    def loosen(tensors: dict[str, Tensor]) -> None:
        dense = weight(source, name)
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{name}.{suffix}"]
        tensors[f"{name}.weight"] = dense.to(torch.bfloat16)

    mixed = changed(source, tmp_path / "mixed", loosen)
    for format in INTEGERS:
        assert convert(mixed, tmp_path / format, settings(format)).layers == 13
        written = read_artifact(tmp_path / format)
        assert written.dtype(f"{name}.weight") == "bfloat16"
        table = written.quantization or {}
        told = [*table.get("ignore", ()), *table.get("dynamic", ())]
        assert any("mlp" in word and "up_proj" in word for word in told)


def test_faults_of_the_user(checkpoint: Open, tmp_path: Path, make_dense: Artifact) -> None:
    source = checkpoint("ct-w4a16")
    with pytest.raises(UsageError, match="not quantized"):
        convert(make_dense, tmp_path / "out", settings("gptq"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UsageError, match="exists already"):
        convert(source, tmp_path / "there", settings("gptq"))
    with pytest.raises(UsageError, match="model that is read"):
        convert(source, source.path, settings("gptq"), replace=True)
    with pytest.raises(InfoptError):
        convert(source, source.path.parent, settings("gptq"), replace=True)


@pytest.fixture
def make_dense(checkpoint: Open, tmp_path: Path) -> Artifact:
    convert(checkpoint("ct-w4a16"), tmp_path / "plain", settings("dense"))
    return read_artifact(tmp_path / "plain")


def test_the_same_request_makes_the_same_bytes(checkpoint: Open, tmp_path: Path) -> None:
    seen: list[Progress] = []
    for name in ("one", "two"):
        convert(checkpoint("awq"), tmp_path / name, settings("gptq"), progress=seen.append)
    for file in ("model.safetensors", "config.json", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert {p.stage for p in seen} == {"re-packing", "comparing with what was written"}
    assert all(p.total == 14 for p in seen)
