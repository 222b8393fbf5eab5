import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infopt.core.artifact.quantized import (
    input_scale,
    is_quantized,
    is_side_tensor,
    kv_format,
    layer_scheme,
    linear_weight,
    stored_names,
)
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.tables import quantization_table
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.gptq import to_gptq
from infopt.core.formats.layout import BLOCK_INPUTS, encode
from infopt.core.formats.nf4 import Nf4Format, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, Layout, StoredWeight

LAYER = "model.layers.0.mlp.up_proj"


def weight(number_format: IntegerFormat, outputs: int = 32, columns: int = 64) -> QuantizedWeight:
    groups = number_format.groups(columns)
    middle = number_format.middle if number_format.symmetric else 3
    return QuantizedWeight(
        codes=torch.randint(0, number_format.max_code + 1, (outputs, columns), dtype=torch.uint8),
        scales=torch.rand(outputs, groups).half(),
        zeros=torch.full((outputs, groups), middle, dtype=torch.uint8),
        group_index=torch.arange(columns, dtype=torch.int32) // (columns // groups),
        format=number_format,
    )


def artifact(
    path: Path, found: QuantizedWeight, table: dict[str, Any], *, sibling: bool = False
) -> Artifact:
    path.mkdir(exist_ok=True)
    tensors = {f"{LAYER}.{key}": part for key, part in to_gptq(found).items()}
    save_file({**tensors, "dense.weight": torch.ones(2, 2)}, path / "model.safetensors")
    config = {} if sibling else {"quantization_config": table}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if sibling:
        (path / "quantize_config.json").write_text(json.dumps(table))
    return read_artifact(path)


def table(**changes: Any) -> dict[str, Any]:
    known = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    return {**known, **changes}


@pytest.mark.parametrize("sibling", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_layer_is_read(tmp_path: Path, bits: int, sibling: bool) -> None:
    expected = weight(IntegerFormat(bits, True, 32))
    found = artifact(tmp_path, expected, table(bits=bits), sibling=sibling)
    layer = linear_weight(found, LAYER)
    assert isinstance(layer, QuantizedWeight) and layer.format == expected.format
    assert torch.equal(layer.dequantize(), expected.dequantize())


def test_a_group_size_of_minus_one_is_the_row(tmp_path: Path) -> None:
    expected = weight(IntegerFormat(4, False, None))
    found = artifact(tmp_path, expected, table(group_size=-1, sym=False))
    layer = linear_weight(found, LAYER)
    assert isinstance(layer, QuantizedWeight) and layer.format.group_size is None
    assert torch.equal(layer.dequantize(), expected.dequantize())


def test_the_label_v2_is_respected(tmp_path: Path) -> None:
    expected = weight(IntegerFormat(4, False, 32))
    found = artifact(tmp_path, expected, table(sym=False, checkpoint_format="gptq_v2"))
    layer = linear_weight(found, LAYER)
    assert isinstance(layer, QuantizedWeight)
    assert torch.equal(layer.zeros, expected.zeros - 1), "stored as v1, read as v2"


def test_a_dense_layer_is_its_tensor(tmp_path: Path) -> None:
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), table())
    assert torch.equal(torch.as_tensor(linear_weight(found, "dense")), torch.ones(2, 2))
    assert is_quantized(found, LAYER) and not is_quantized(found, "dense")
    assert len(stored_names(found, f"{LAYER}.weight")) == 4
    assert stored_names(found, "dense.weight") == ("dense.weight",)
    assert stored_names(found, "absent.weight") == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"bits": 5}, "5"),
        ({"group_size": "many"}, "many"),
        ({"checkpoint_format": "marlin"}, "marlin"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), table(**changes))
    with pytest.raises(UnsupportedError, match=named):
        linear_weight(found, LAYER)


INT8, STATIC = ActivationFormat("int"), ActivationFormat("float", 8, "tensor", dynamic=False)
OUTLIERS = ActivationFormat("int", outlier_threshold=6.0)
EVERY: list[tuple[Layout, LayerScheme]] = [
    ("gptq", LayerScheme(IntegerFormat(3, True, 32))),
    ("gptq", LayerScheme(IntegerFormat(4, False, 32))),
    ("awq", LayerScheme(IntegerFormat(4, True, 32))),
    ("awq", LayerScheme(IntegerFormat(4, False, 64))),
    ("compressed-tensors", LayerScheme(IntegerFormat(4, False, 32))),
    ("compressed-tensors", LayerScheme(IntegerFormat(8, True, None))),
    ("compressed-tensors", LayerScheme(IntegerFormat(8, True, None), INT8)),
    ("compressed-tensors", LayerScheme(IntegerFormat(4, True, 64), INT8)),
    ("compressed-tensors", LayerScheme(Fp8Format("channel"), ActivationFormat("float"))),
    ("compressed-tensors", LayerScheme(Fp8Format("tensor"), STATIC)),
    ("compressed-tensors", LayerScheme(Fp8Format("block"), BLOCK_INPUTS)),
    ("fp8", LayerScheme(Fp8Format("block"), BLOCK_INPUTS)),
    ("bitsandbytes", LayerScheme(IntegerFormat(8, True, None), OUTLIERS)),
    ("bitsandbytes", LayerScheme(Nf4Format(True))),
    ("bitsandbytes", LayerScheme(Nf4Format(False))),
]


def weight_of(scheme: LayerScheme) -> StoredWeight:
    """A weight 128 x 256."""
    match scheme.weight:
        case IntegerFormat() as form:
            return weight(form, 128, 256)
        case Fp8Format() as form:
            return to_fp8(torch.randn(128, 256), form)
        case Nf4Format() as form:
            return quantize_nf4(torch.randn(128, 256), form)


@pytest.mark.parametrize(("layout", "scheme"), EVERY)
def test_every_format_is_read_as_it_was_written(
    tmp_path: Path, layout: Layout, scheme: LayerScheme
) -> None:
    expected = weight_of(scheme)
    scale = torch.tensor([0.25]) if scheme.activation == STATIC else None
    parts = encode(layout, expected, scale, activation=scheme.activation)
    tensors = {f"{LAYER}.{suffix}": part for suffix, part in parts.items()}
    tensors |= {"dense.weight": torch.ones(2, 2), f"{LAYER}.bias": torch.ones(128)}
    save_file(tensors, tmp_path / "model.safetensors")
    said = quantization_table(layout, {LAYER: scheme}, ["dense"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    found = read_artifact(tmp_path)

    assert is_quantized(found, LAYER) and not is_quantized(found, "dense")
    read = linear_weight(found, LAYER)
    assert not isinstance(read, torch.Tensor) and type(read) is type(expected)
    assert read.format == expected.format
    assert torch.equal(read.dequantize(), expected.dequantize())
    assert layer_scheme(found, LAYER) == scheme and layer_scheme(found, "dense") is None
    stored = input_scale(found, LAYER)
    assert (stored is None) == (scale is None) and (stored is None or stored.tolist() == [0.25])
    names = stored_names(found, f"{LAYER}.weight")
    assert set(names) == set(tensors) - {"dense.weight", f"{LAYER}.bias"}
    assert names[0].rpartition(".")[2] in ("weight", "qweight", "weight_packed")
    assert stored_names(found, f"{LAYER}.bias") == (f"{LAYER}.bias",)
    assert found.summary().parameters == 128 * 256 + 4 + 128


def test_scales_of_the_kv_cache_belong_to_no_layer(tmp_path: Path) -> None:
    scheme = LayerScheme(IntegerFormat(4, True, 32))
    said = quantization_table("compressed-tensors", {LAYER: scheme}, [], kv="int8")
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), said)
    assert kv_format(found) == "int8"
    attention = "model.layers.0.self_attn"
    assert is_side_tensor(f"{attention}.k_scale") and is_side_tensor(f"{attention}.v_scale")
    assert not is_side_tensor(f"{LAYER}.weight_scale")
    assert not is_side_tensor(f"{attention}.k_proj.weight")
    plain = artifact(tmp_path / "plain", weight(IntegerFormat(4, True, 32)), table())
    assert kv_format(plain) is None


def test_a_static_scale_that_is_missing_is_named(tmp_path: Path) -> None:
    scheme = LayerScheme(Fp8Format("tensor"), STATIC)
    parts = encode("compressed-tensors", weight_of(scheme), activation=STATIC)
    tensors = {f"{LAYER}.{suffix}": part for suffix, part in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    said = quantization_table("compressed-tensors", {LAYER: scheme}, [])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(ArtifactError, match=r"lacks .*up_proj\.input_scale"):
        input_scale(read_artifact(tmp_path), LAYER)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (table(quant_method="awq", bits=4), None),
        (table(quant_method="compressed-tensors"), "no config group"),
        (table(quant_method="bitsandbytes", load_in_8bit=True), r"up_proj\.weight, which"),
        (table(quant_method="fp8"), r"up_proj\.weight, which"),
    ],
)
def test_tensors_of_another_format_than_said_are_told(
    tmp_path: Path, said: dict[str, Any], named: str | None
) -> None:
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), said)
    with pytest.raises(ArtifactError, match=named):
        linear_weight(found, LAYER)


def test_the_layers_of_one_file_may_differ(tmp_path: Path) -> None:
    other = "model.layers.1.mlp.up_proj"
    schemes = {
        LAYER: LayerScheme(IntegerFormat(4, True, 32)),
        other: LayerScheme(IntegerFormat(3, False, 64)),
    }
    weights = {name: weight_of(scheme) for name, scheme in schemes.items()}
    save_file(
        {
            f"{name}.{suffix}": part
            for name, stored in weights.items()
            for suffix, part in encode("gptq", stored).items()
        },
        tmp_path / "model.safetensors",
    )
    said = quantization_table("gptq", schemes, [])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    found = read_artifact(tmp_path)
    for name, stored in weights.items():
        read = linear_weight(found, name)
        assert isinstance(read, QuantizedWeight) and read.format == stored.format
        assert torch.equal(read.dequantize(), stored.dequantize())
    assert found.summary().parameters == 2 * 128 * 256
    assert found.summary().quantization == "gptq 3/4-bit g32/g64 sym"


def test_codes_without_a_config_are_told(tmp_path: Path) -> None:
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), table())
    bare = Artifact(found.name, found.path, {}, found.files, found.headers)
    with pytest.raises(ArtifactError, match="no quantization_config"):
        linear_weight(bare, LAYER)
