from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infopt.core.artifact.headers import TensorHeader
from infopt.core.artifact.read import Artifact
from infopt.core.errors import UnsupportedError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.models.inputs import round_inputs_as_stored, round_layer_inputs

FORM = ActivationFormat("int", bits=4)
STATIC = ActivationFormat("int", strategy="tensor", dynamic=False)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_layer_sees_its_input_rounded_until_the_handle_is_removed() -> None:
    net, x = model(), torch.randn(3, 8)
    whole, wanted = net(x), net[2](round_inputs(net[1](net[0](x)), FORM))
    handle = round_layer_inputs(net, "2", FORM)
    assert torch.equal(net(x), wanted)
    assert not torch.equal(net(x), whole)
    handle.remove()
    assert torch.equal(net(x), whole)


def test_a_static_scale_is_used() -> None:
    net, x, scale = model(), torch.randn(3, 8), torch.tensor([0.5])
    bare = net[0](round_inputs(x, STATIC, scale))
    round_layer_inputs(net, "0", STATIC, scale)
    assert torch.equal(net[0](x), bare)


def stored(*layers: str) -> Artifact:
    """An artifact that holds nothing but layers in int8, the inputs of all but '0' in 8 bits."""
    headers: dict[str, Any] = {}
    for layer in layers:
        headers[f"{layer}.weight"] = TensorHeader(Path("file"), "int8", (4, 8), 32)
    group = {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "targets": ["Linear"],
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    }
    plain = {**group, "targets": ["0"], "input_activations": None}
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": plain, "group_1": group},
        }
    }
    files = dict.fromkeys(headers, Path("file"))
    return Artifact("stored", Path("stored"), config, files, headers)


def test_the_layers_that_the_artifact_names_are_rounded() -> None:
    net, x = model(), torch.randn(3, 8)
    form = ActivationFormat("int")
    wanted = net[2](round_inputs(net[1](net[0](x)), form))
    names = {"0.weight": ("0.weight",), "2.weight": ("old.2.weight", "old.2.weight_scale")}
    round_inputs_as_stored(net, stored("0", "old.2"), lambda name: names.get(name, ()))
    assert torch.equal(net(x), wanted)


def test_a_layer_that_is_no_module_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"the inputs of experts\.1 are quantized"):
        round_inputs_as_stored(model(), stored("0", "experts.1"), lambda name: (name,))
