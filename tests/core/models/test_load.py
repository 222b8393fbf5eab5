import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError
from infopt.core.formats.gptq import to_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.load import load_decoder

CPU = torch.device("cpu")
Tiny = Callable[[str], tuple[Artifact, Any]]


def changed(
    artifact: Artifact, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> Artifact:
    """A copy of the artifact with its tensors changed."""
    copy = folder / "changed"
    shutil.copytree(artifact.path, copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return read_artifact(copy)


def test_weights_arrive_in_the_dtype_asked_for(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[0], torch.bfloat16, CPU)
    assert decoder.dtype == decoder.layers[1].mlp.down.weight.dtype == torch.bfloat16


def test_a_missing_tensor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    artifact = changed(tiny("llama")[0], tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ArtifactError, match=name):
        load_decoder(artifact, torch.float32, CPU)


def test_a_tensor_of_another_shape_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    artifact = changed(
        tiny("llama")[0], tmp_path, lambda tensors: tensors.update({name: torch.zeros(3, 4)})
    )
    with pytest.raises(ArtifactError, match=rf"{name} is \[3, 4\]"):
        load_decoder(artifact, torch.float32, CPU)


def test_a_quantized_linear_is_made_dense(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    out, into, groups = 64, 96, 3
    weight = QuantizedWeight(
        codes=torch.randint(16, (out, into), dtype=torch.uint8),
        scales=torch.rand(out, groups).half(),
        zeros=torch.full((out, groups), 8, dtype=torch.uint8),
        group_index=torch.arange(into, dtype=torch.int32) // 32,
        format=IntegerFormat(4, symmetric=True, group_size=32),
    )

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}.weight"]
        stored = to_gptq(weight)
        tensors.update({f"{name}.{suffix}": t.contiguous() for suffix, t in stored.items()})

    artifact = changed(tiny("llama")[0], tmp_path, quantize)
    artifact.config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    decoder = load_decoder(artifact, torch.float32, CPU)
    torch.testing.assert_close(decoder.layers[0].mlp.down.weight, weight.dequantize().float())
