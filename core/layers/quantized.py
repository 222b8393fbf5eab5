"""A projection whose weight stays packed in memory and is dequantized as it is multiplied."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.core.formats.exact import in_order
from infopt.core.formats.fp8 import BLOCK as FP8_BLOCK
from infopt.core.formats.fp8 import Fp8Weight
from infopt.core.formats.nf4 import BLOCK, NESTED_BLOCK, Nf4Weight
from infopt.core.formats.number import QuantizedWeight
from infopt.core.formats.scheme import StoredWeight
from infopt.kernels.gemm.floats import Fp8Rows, Nf4Rows, has_nan, pack_pairs, pair_values
from infopt.kernels.gemm.int4 import GROUP_SIZES, MIDDLE, TILE, Int4Tiles, int4_linear, to_tiles
from infopt.kernels.gemm.int4 import usable as int4_usable
from infopt.kernels.gemm.integers import IntegerRows, pack_planes
from infopt.kernels.gemm.rows import rows_linear
from infopt.kernels.gemm.scratch import Scratch

Packed = IntegerRows | Int4Tiles | Fp8Rows | Nf4Rows


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """y = x W^T + b; W is what its checkpoint format dequantizes to, rounded to the dtype of x.

    In float32 W is exact. Where torch's int4 product serves (bfloat16 on a CPU with AVX-512, 4
    bits), a group's scale and offset are rounded to bfloat16 instead of its weights.
    """

    weight: Packed
    scratch: Scratch
    """Shared by the layers of a decoder."""
    bias: Tensor | None = None
    columns: Tensor | None = None
    """int32 [K]: the order of x in which the groups' columns are neighbours, where it is not so."""
    fixed: bool = False
    """A row's result never depends on the others."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        rows = x.reshape(-1, x.shape[-1])
        if self.columns is not None:
            rows = rows.index_select(1, self.columns)
        match self.weight:
            case Int4Tiles():
                y = int4_linear(rows, self.weight, self.bias, self.scratch, fixed=self.fixed)
            case _:
                y = rows_linear(rows, self.weight, self.bias, self.scratch, fixed=self.fixed)
        return y.view(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        order = self.columns.nbytes if self.columns is not None else 0
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0) + order


def pack(
    weight: StoredWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Scratch,
    fixed: bool = False,
    by_rows: bool = False,
) -> QuantizedLinear | None:
    """The weight as products of `dtype` on `device` want it; None for one that must be dense.

    That is: float8 with a NaN, and integers in groups of several sizes. `by_rows`: integers as
    `IntegerRows`, whatever product there is; `in_tiles` makes up for it.
    """
    columns = None
    packed: Packed
    match weight:
        case QuantizedWeight():
            if not in_order(weight.group_index, weight.scales.shape[1]):
                columns = torch.argsort(weight.group_index, stable=True)
                weight = _ordered(weight, columns)
                if not in_order(weight.group_index, weight.scales.shape[1]):
                    return None
            packed = _integers(weight, None if by_rows else dtype, device)
        case Fp8Weight():
            if has_nan(weight.codes):
                return None
            block = FP8_BLOCK[0] if weight.format.strategy == "block" else None
            packed = Fp8Rows(weight.codes.to(device), weight.scales.to(device), block)
        case Nf4Weight():
            packed = _nf4(weight, device)
    order = None if columns is None else columns.to(device, torch.int32)
    return QuantizedLinear(packed, scratch, bias, order, fixed)


def _ordered(weight: QuantizedWeight, columns: Tensor) -> QuantizedWeight:
    index = weight.group_index[columns]
    return replace(weight, codes=weight.codes[:, columns], group_index=index)


def _integers(
    weight: QuantizedWeight, dtype: torch.dtype | None, device: torch.device
) -> IntegerRows | Int4Tiles:
    """For products of `dtype`; None: as rows."""
    outputs, inputs = weight.codes.shape
    zero = int(weight.zeros.flatten()[0])
    same = bool((weight.zeros == zero).all())
    bits, groups = weight.format.bits, weight.scales.shape[1]
    if (device.type, dtype) == ("cpu", torch.bfloat16) and _tileable(outputs, inputs, bits, groups):
        return _tiles(weight.codes, weight.scales, weight.zeros)
    return IntegerRows(
        planes=tuple(plane.to(device) for plane in pack_planes(weight.codes, bits)),
        scales=weight.scales.to(device),
        zeros=zero if same else weight.zeros.to(device),
        bits=bits,
        inputs=inputs,
    )


def in_tiles(linear: QuantizedLinear) -> QuantizedLinear:
    """The same with torch's int4 product in bfloat16, where that serves."""
    weight = linear.weight
    if not isinstance(weight, IntegerRows):
        return linear
    if not _tileable(*weight.shape, weight.bits, weight.scales.shape[1]):
        return linear
    codes = weight.codes(slice(0, weight.shape[0]), linear.scratch)
    return replace(linear, weight=_tiles(codes, weight.scales, weight.zeros))


def _tileable(outputs: int, inputs: int, bits: int, groups: int) -> bool:
    fits = any(inputs // groups % size == 0 for size in GROUP_SIZES)
    return bits == 4 and outputs % TILE == 0 and fits and int4_usable()


def _tiles(codes: Tensor, scales: Tensor, zeros: Tensor | int) -> Int4Tiles:
    """Groups that are wider than the product knows become several of the same scale."""
    size = codes.shape[1] // scales.shape[1]
    repeats = size // next(n for n in GROUP_SIZES if size % n == 0)
    scales = scales.float()
    offsets = (MIDDLE - (zeros if isinstance(zeros, int) else zeros.float())) * scales
    both = torch.stack((scales, offsets), dim=-1).repeat_interleave(repeats, dim=1)
    return Int4Tiles(to_tiles(codes), both.transpose(0, 1).to(torch.bfloat16).contiguous())


def _nf4(weight: Nf4Weight, device: torch.device) -> Nf4Rows:
    nested, nested_map = weight.nested_absmax, weight.nested_map
    return Nf4Rows(
        codes=pack_pairs(weight.codes).to(device),
        pairs=pair_values(weight.quant_map).to(device),
        absmax=weight.absmax.to(device),
        nested_absmax=None if nested is None else nested.to(device),
        nested_map=None if nested_map is None else nested_map.to(device),
        offset=weight.offset,
        size=(weight.codes.shape[0], weight.codes.shape[1]),
        block=BLOCK,
        nested_block=NESTED_BLOCK,
    )


def fused_quantized(parts: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """Projections of the same input as one; None where they are not packed alike."""
    first = parts[0]
    weight = _fused([part.weight for part in parts])
    if weight is None or not all(_same(part.columns, first.columns) for part in parts):
        return None
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "either all parts have a bias or none"
    return replace(first, weight=weight, bias=torch.cat(biases) if biases else None)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _fused(parts: Sequence[Packed]) -> Packed | None:
    match parts[0]:
        case Int4Tiles():
            tiles = [part for part in parts if isinstance(part, Int4Tiles)]
            return _fused_tiles(tiles) if len(tiles) == len(parts) else None
        case IntegerRows():
            rows = [part for part in parts if isinstance(part, IntegerRows)]
            return _fused_integers(rows) if len(rows) == len(parts) else None
        case Fp8Rows():
            floats = [part for part in parts if isinstance(part, Fp8Rows)]
            return _fused_fp8(floats) if len(floats) == len(parts) else None
        case Nf4Rows():
            return None  # its blocks run on from one row to the next


def _fused_tiles(parts: Sequence[Int4Tiles]) -> Int4Tiles | None:
    if len({part.scales_offsets.shape[0] for part in parts}) > 1:
        return None
    return Int4Tiles(
        torch.cat([part.tiles for part in parts]),
        torch.cat([part.scales_offsets for part in parts], dim=1),
    )


def _fused_integers(parts: Sequence[IntegerRows]) -> IntegerRows | None:
    zeros: Tensor | int | None
    kinds = {(p.bits, p.scales.shape[1], p.scales.dtype, isinstance(p.zeros, int)) for p in parts}
    if len(kinds) > 1:
        return None
    first = parts[0]
    if isinstance(first.zeros, int):
        zeros = first.zeros if {p.zeros for p in parts} == {first.zeros} else None
    else:
        zeros = torch.cat([p.zeros for p in parts if isinstance(p.zeros, Tensor)])
    if zeros is None:
        return None
    planes = zip(*(part.planes for part in parts), strict=True)
    return replace(
        first,
        planes=tuple(torch.cat(plane) for plane in planes),
        scales=torch.cat([part.scales for part in parts]),
        zeros=zeros,
    )


def _fused_fp8(parts: Sequence[Fp8Rows]) -> Fp8Rows | None:
    """Scales of whole tensors become those of rows."""
    if len({(part.block, part.scales.dtype) for part in parts}) > 1:
        return None
    block = parts[0].block
    if block is not None and any(part.shape[0] % block for part in parts[:-1]):
        return None
    scales = [
        part.scales if part.scales.ndim == 2 else part.scales.expand(part.shape[0], 1)
        for part in parts
    ]
    # Codes of float8 cannot be joined everywhere, bytes can.
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
    return Fp8Rows(codes.view(torch.float8_e4m3fn), torch.cat(scales), block)
