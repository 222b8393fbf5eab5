"""What torch, and torchao where it is installed, have for products with packed weights on a GPU.

Each way is tried before it is timed (`card_made.standing`); what this torch or this GPU cannot do
is left out with the reason. None of them has run where there was no GPU.
"""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from infopt.core.formats.activation import FP8_MAX, ActivationFormat, input_steps
from infopt.kernels.gpu import integer_columns
from infopt.kernels.gpu.fp8_matrix import BLOCK, Fp8Matrix
from infopt.kernels.gpu.integer_columns import IntegerColumns

Multiply = Callable[[Tensor], object]
BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
_INNER_TILES = 8


def integer_ways(weight: IntegerColumns) -> Mapping[str, Multiply]:
    """For integers less one zero: torch's int4 product, and torchao's of the same bits."""
    if weight.words.device.type != "cuda" or weight.bits not in (4, 8):
        return {}
    found: dict[str, Multiply] = {}
    if weight.bits == 4 and weight.group:
        found["_weight_int4pack_mm"] = _later(partial(_int4pack, weight))
    if torchao_here():
        found["torchao"] = _later(partial(_torchao_integers, weight))
    return found


def int8_ways(codes: Tensor, scales: Tensor) -> Mapping[str, Multiply]:
    """torchao's W8A8, of the same weight as nearly as it rounds it."""
    if codes.device.type != "cuda" or not torchao_here():
        return {}
    return {"torchao": _later(partial(_torchao_int8, codes, scales))}


def torchao_here() -> bool:
    return importlib.util.find_spec("torchao") is not None


def _later(build: Callable[[], Multiply]) -> Multiply:
    """Built at its first call, so that what cannot be built is told of as what cannot be run."""
    made: list[Multiply] = []

    def way(x: Tensor) -> object:
        if not made:
            made.append(build())
        return made[0](x)

    return way


def _int4pack(weight: IntegerColumns) -> Multiply:
    """tinygemm: codes of two inputs a byte, the first in the high nibble; scales and zeros in
    bfloat16, (code - 8) * scale + zero."""
    middle = torch.full_like(weight.scales, 1.0)
    codes = integer_columns.reference(
        IntegerColumns(weight.words, middle, 0, weight.bits, weight.inputs)
    ).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_TILES)
    zeros = (8 - weight.zero) * weight.scales.float()
    both = torch.stack((weight.scales.float(), zeros), dim=-1).to(BF16)
    return lambda x: torch._weight_int4pack_mm(x, packed, weight.group, both)


def _torchao(weight: Tensor, config: object) -> Multiply:
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.to(BF16), requires_grad=False)
    quantize_(linear, config)
    return linear


def _torchao_integers(weight: IntegerColumns) -> Multiply:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    whole = integer_columns.reference(weight)
    if weight.bits == 4:
        return _torchao(whole, Int4WeightOnlyConfig(group_size=weight.group))
    return _torchao(whole, Int8WeightOnlyConfig())


def _torchao_int8(codes: Tensor, scales: Tensor) -> Multiply:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    whole = codes.float() * scales[:, None]
    return _torchao(whole, Int8DynamicActivationInt8WeightConfig())


def scaled_rows(weight: Fp8Matrix, form: ActivationFormat, x: Tensor) -> Tensor:
    """torch._scaled_mm with a scale for each row and each output."""
    steps, scales = input_steps(x, form)
    return torch._scaled_mm(
        steps.to(F8), weight.codes.t(), scales, weight.scales[None], out_dtype=BF16
    )


def scaled_blocks(weight: Fp8Matrix, x: Tensor) -> Tensor:
    """The same with a scale for each 128 of a row, and for each block of the weight."""
    groups = x.float().view(len(x), -1, BLOCK)
    scales = groups.abs().amax(2) / FP8_MAX
    codes = (groups / scales[:, :, None]).to(F8).view(x.shape)
    # cuBLAS wants the scales of one block of all rows side by side.
    return torch._scaled_mm(
        codes, weight.codes.t(), scales.t().contiguous().t(), weight.scales.t(), out_dtype=BF16
    )
