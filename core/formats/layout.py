"""The checkpoint formats side by side: which layers each can hold, and the tensors it has."""

import torch
from torch import Tensor

from infopt.core.errors import UnsupportedError
from infopt.core.formats import awq, bitsandbytes, compressed, fp8_block, gptq
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import BLOCK, Fp8Format, Fp8Weight
from infopt.core.formats.nf4 import Nf4Format, Nf4Weight
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, Layout, StoredWeight

BLOCK_INPUTS = ActivationFormat("float", 8, "group", True, BLOCK[1])
"""The inputs of a layer with fp8 blocks."""
SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "gptq": gptq.SUFFIXES,
    "awq": awq.SUFFIXES,
    "compressed-tensors": compressed.SUFFIXES,
    "fp8": fp8_block.SUFFIXES,
    "bitsandbytes": (*bitsandbytes.SUFFIXES_NF4, *bitsandbytes.SUFFIXES_INT8[1:]),
}
"""What may follow a layer's name and a dot; the first is not always there."""


def encode(
    layout: Layout,
    weight: StoredWeight,
    input_scale: Tensor | None = None,
    *,
    activation: ActivationFormat | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The tensors of a layer [N, K], by what follows its name and a dot.

    `activation` must be that of the layer's scheme: compressed-tensors packs integers only
    where inputs are not rounded. `dtype`: what bitsandbytes dequantizes NF4 to. Raises
    UnsupportedError for what the format cannot hold; `why_not` tells most of it beforehand.
    """
    outputs, inputs = weight.codes.shape
    clause = why_not(layout, LayerScheme(weight.format, activation), outputs, inputs)
    if clause is not None:
        raise UnsupportedError(f"{layout} cannot hold this layer: {clause}")
    match layout, weight:
        case "gptq", QuantizedWeight():
            return gptq.to_gptq(weight)
        case "awq", QuantizedWeight():
            return awq.to_awq(weight)
        case "compressed-tensors", QuantizedWeight() if activation is None:
            return compressed.to_packed(weight)
        case "compressed-tensors", QuantizedWeight():
            return compressed.to_int(weight, input_scale)
        case "compressed-tensors", Fp8Weight():
            return compressed.to_float(weight, input_scale)
        case "fp8", Fp8Weight():
            return fp8_block.to_fp8_block(weight)
        case "bitsandbytes", QuantizedWeight():
            return bitsandbytes.to_int8(weight)
        case "bitsandbytes", Nf4Weight():
            return bitsandbytes.to_nf4(weight, dtype)
    raise AssertionError("why_not let it through")


def why_not(layout: Layout, scheme: LayerScheme, outputs: int, inputs: int) -> str | None:
    """One clause that says why the format cannot hold a layer [outputs, inputs]; None if it can."""
    form = scheme.weight
    if isinstance(form, IntegerFormat) and inputs % (form.group_size or inputs):
        return f"groups of {form.group_size} do not divide its {inputs} inputs"
    match layout:
        case "gptq":
            return _not_gptq(scheme, outputs, inputs)
        case "awq":
            return _not_awq(scheme, outputs)
        case "compressed-tensors":
            return _not_compressed(scheme, inputs)
        case "fp8":
            return _not_fp8(scheme, outputs, inputs)
        case "bitsandbytes":
            return _not_bitsandbytes(scheme, inputs)


def _not_gptq(scheme: LayerScheme, outputs: int, inputs: int) -> str | None:
    form = scheme.weight
    if not isinstance(form, IntegerFormat) or form.bits not in gptq.BITS:
        return f"gptq has integers of {_listed(gptq.BITS)} bits"
    if scheme.activation is not None:
        return "gptq has weights only, no rounded inputs"
    if outputs % gptq.MULTIPLE or inputs % gptq.MULTIPLE:
        return f"gptq needs both sides divisible by {gptq.MULTIPLE}, not {outputs} x {inputs}"
    return None


def _not_awq(scheme: LayerScheme, outputs: int) -> str | None:
    form = scheme.weight
    if not isinstance(form, IntegerFormat) or form.bits != awq.BITS:
        return f"awq has integers of {awq.BITS} bits"
    if scheme.activation is not None:
        return "awq has weights only, no rounded inputs"
    if outputs % awq.MULTIPLE:
        return f"awq needs outputs divisible by {awq.MULTIPLE}, not {outputs}"
    return None


def _not_compressed(scheme: LayerScheme, inputs: int) -> str | None:
    form, activation = scheme.weight, scheme.activation
    if activation is not None and activation.outlier_threshold is not None:
        return "compressed-tensors cannot leave out columns of outliers"
    if activation is not None and not activation.dynamic and activation.strategy != "tensor":
        return "compressed-tensors stores one scale for a layer's inputs, not several"
    match form:
        case IntegerFormat(bits=bits):
            if bits not in compressed.BITS:
                return (
                    f"the packing of {bits} bits by compressed-tensors is not stable between its "
                    f"versions: {_listed(compressed.BITS)} bits only"
                )
            if activation is not None and activation.kind != "int":
                return "integer weights take integer inputs in compressed-tensors"
            if activation is not None and not bits <= activation.bits <= 8:
                return "compressed-tensors has inputs of as many bits as the weight, up to 8"
        case Fp8Format(strategy=strategy):
            if activation is not None and activation.kind != "float":
                return "float weights take float inputs in compressed-tensors"
            if strategy == "block" and inputs % BLOCK[1]:
                return f"blocks of {BLOCK[1]} do not divide its {inputs} inputs"
        case Nf4Format():
            return "compressed-tensors has no NF4"
    if activation is not None and inputs % (activation.group_size or inputs):
        return f"groups of {activation.group_size} do not divide its {inputs} inputs"
    return None


def _not_fp8(scheme: LayerScheme, outputs: int, inputs: int) -> str | None:
    if scheme.weight != Fp8Format("block"):
        return f"the fp8 format has float8 weights in blocks of {BLOCK[0]} x {BLOCK[1]}"
    if scheme.activation != BLOCK_INPUTS:
        return f"the fp8 format has inputs rounded to float8 as they come, in groups of {BLOCK[1]}"
    # transformers takes the height of a block for the outputs divided by the rows of scales.
    if outputs > BLOCK[0] and outputs % BLOCK[0]:
        return f"the fp8 format needs outputs divisible by {BLOCK[0]}, not {outputs}"
    if inputs % BLOCK[1]:
        return f"groups of {BLOCK[1]} do not divide its {inputs} inputs"
    return None


def _not_bitsandbytes(scheme: LayerScheme, inputs: int) -> str | None:
    form, activation = scheme.weight, scheme.activation
    if isinstance(form, Nf4Format):
        if activation is not None:
            return "bitsandbytes has no rounded inputs beside NF4"
        return "NF4 packs two weights of a row, and its inputs are odd" if inputs % 2 else None
    if form != IntegerFormat(8, True, None):
        return "bitsandbytes has NF4, and symmetric 8-bit integers with a scale per row"
    threshold = activation.outlier_threshold if activation is not None else None
    if activation != ActivationFormat("int", 8, "token", True, None, threshold):
        return "8-bit weights of bitsandbytes have inputs of 8-bit integers, scaled per token"
    if threshold is None:
        return "8-bit weights of bitsandbytes have a threshold for outliers"
    return None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
