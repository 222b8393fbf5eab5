"""Inputs of a transformers model's layers, rounded as their number format says."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from infopt.core.artifact.quantized import input_scale, layer_scheme
from infopt.core.artifact.read import Artifact
from infopt.core.errors import UnsupportedError
from infopt.core.formats.activation import ActivationFormat, round_inputs


def round_layer_inputs(
    model: nn.Module, name: str, form: ActivationFormat, scale: Tensor | None = None
) -> RemovableHandle:
    """Let the layer `name` see its input [..., K] quantized and dequantized.

    `scale` is the stored one of a static format. The handle's `remove` undoes it.
    """

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        at_hand = None if scale is None else scale.to(x.device)
        return (round_inputs(x, form, at_hand), *args[1:])

    return model.get_submodule(name).register_forward_pre_hook(hook)


def round_inputs_as_stored(
    model: nn.Module, artifact: Artifact, stored: Callable[[str], tuple[str, ...]]
) -> None:
    """Round the inputs of every layer whose inputs the artifact says are quantized.

    `stored` gives the artifact's tensors for a parameter of the model. Raises UnsupportedError
    where such a layer of the artifact is no module of the model, so that its inputs stay hidden.
    """
    rounded: set[str] = set()
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        for layer in {tensor.rpartition(".")[0] for tensor in stored(f"{name}.weight")}:
            if (form := _activation(artifact, layer)) is not None:
                round_layer_inputs(model, name, form, input_scale(artifact, layer))
                rounded.add(layer)
    layers = sorted({name.rpartition(".")[0] for name in artifact.names()} - rounded)
    for layer in layers:
        if _activation(artifact, layer) is not None:
            raise UnsupportedError(
                f"{artifact.path}: the inputs of {layer} are quantized, but transformers has no "
                "such layer to round them at"
            )


def _activation(artifact: Artifact, layer: str) -> ActivationFormat | None:
    scheme = layer_scheme(artifact, layer)
    return scheme.activation if scheme is not None else None
