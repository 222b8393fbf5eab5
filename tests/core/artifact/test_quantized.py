import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infopt.core.artifact.quantized import is_quantized, linear_weight, stored_names
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.gptq import to_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

LAYER = "model.layers.0.mlp.up_proj"


def weight(number_format: IntegerFormat) -> QuantizedWeight:
    groups = number_format.groups(64)
    middle = number_format.middle if number_format.symmetric else 3
    return QuantizedWeight(
        codes=torch.randint(0, number_format.max_code + 1, (32, 64), dtype=torch.uint8),
        scales=torch.rand(32, groups).half(),
        zeros=torch.full((32, groups), middle, dtype=torch.uint8),
        group_index=torch.arange(64, dtype=torch.int32) // (64 // groups),
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
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 5}, "5"),
        ({"group_size": "many"}, "many"),
        ({"checkpoint_format": "marlin"}, "marlin"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), table(**changes))
    with pytest.raises(UnsupportedError, match=named):
        linear_weight(found, LAYER)


def test_codes_without_a_config_are_told(tmp_path: Path) -> None:
    found = artifact(tmp_path, weight(IntegerFormat(4, True, 32)), table())
    bare = Artifact(found.name, found.path, {}, found.files, found.headers)
    with pytest.raises(ArtifactError, match="no quantization_config"):
        linear_weight(bare, LAYER)
