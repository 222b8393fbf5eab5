"""One layer: what a checkpoint format would say against it, its new tensors, and their proof."""

import torch
from torch import Tensor

from infopt.core.artifact.quantized import input_scale, layer_scheme, linear_weight
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, NumericsError, UnsupportedError
from infopt.core.formats.layout import encode, why_not
from infopt.core.formats.scheme import LayerScheme, Layout, StoredWeight


def scheme_of(artifact: Artifact, layer: str) -> LayerScheme:
    """The number formats of a layer that is known to be quantized."""
    scheme = layer_scheme(artifact, layer)
    assert scheme is not None, f"{layer} is quantized"
    return scheme


def stored_weight(artifact: Artifact, layer: str) -> StoredWeight:
    """The codes and scales of a layer that is known to be quantized."""
    weight = linear_weight(artifact, layer)
    assert not isinstance(weight, Tensor), f"{layer} is quantized"
    return weight


def refusal(
    layout: Layout, scheme: LayerScheme, outputs: int, inputs: int, *, transposed: bool
) -> str | None:
    """Why a format cannot hold a layer, as far as its scheme and shape tell; None if it may.

    `transposed`: dense checkpoints hold its weight as [inputs, outputs] (Conv1D).
    """
    if transposed and layout != "gptq":
        return "its loaders look for nn.Linear, and this layer is a Conv1D"
    return why_not(layout, scheme, outputs, inputs)


def repacked(artifact: Artifact, layer: str, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a quantized layer in another format, by their full names.

    Raises UnsupportedError, naming the layer, where the format cannot hold its very values.
    """
    weight = stored_weight(artifact, layer)
    scheme = scheme_of(artifact, layer)
    try:
        tensors = encode(layout, weight, input_scale(artifact, layer), activation=scheme.activation)
    except UnsupportedError as error:
        raise UnsupportedError(f"{layer}: {error.message}", error.hint) from None
    return {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}


def dequantized(
    artifact: Artifact, layer: str, dtype: torch.dtype, *, transposed: bool
) -> dict[str, Tensor]:
    """The dense weight of a quantized layer, by its full name.

    Raises NumericsError for values that `dtype` has no place for.
    """
    weight = stored_weight(artifact, layer).dequantize(torch.float32)
    value = weight.to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise NumericsError(
            f"{layer} has weights up to {float(weight.abs().max()):.3g}, beyond "
            f"{str(dtype).removeprefix('torch.')}",
            "choose another --dtype",
        )
    return {f"{layer}.weight": (value.T if transposed else value).contiguous()}


def difference(before: Artifact, after: Artifact, layer: str, *, transposed: bool = False) -> float:
    """The largest difference of a layer's weight, dequantized in float32; 0 means bit-equal.

    Raises NumericsError where the inputs would not be rounded in the same way.
    """
    ours = stored_weight(before, layer).dequantize(torch.float32)
    found = linear_weight(after, layer)
    if isinstance(found, Tensor):
        theirs = (found.T if transposed else found).to(torch.float32)
    else:
        theirs = found.dequantize(torch.float32)
        _same_inputs(before, after, layer)
    if ours.shape != theirs.shape:
        raise ArtifactError(
            f"{layer} is {list(theirs.shape)} as read back, but was {list(ours.shape)}"
        )
    if torch.equal(ours, theirs):
        return 0.0
    return float((ours - theirs).abs().max())


def _same_inputs(before: Artifact, after: Artifact, layer: str) -> None:
    schemes = [scheme_of(artifact, layer).activation for artifact in (before, after)]
    scales = [input_scale(artifact, layer) for artifact in (before, after)]
    same_scale = (scales[0] is None) == (scales[1] is None) and (
        scales[0] is None or scales[1] is None or torch.equal(scales[0].float(), scales[1].float())
    )
    if schemes[0] != schemes[1] or not same_scale:
        raise NumericsError(
            f"{layer} rounds its inputs in another way as read back",
            "this is a bug of infopt; nothing was kept of the artifact",
        )
