"""4-bit weights in bfloat16 on a CPU with AVX-512, in the layout of torch's own int4 product.

Of torch's layout only the bytes' order is relied on, and `usable` sees for itself that it is as
written here: [N / 64, K, 32] bytes, byte b of a column with row b in its low half and row b + 32
in its high half.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from infopt.kernels.gemm.scratch import Scratch

GROUP_SIZES = (256, 128, 64, 32)
TILE = 64
"""Rows of the weight that are packed together."""
MIDDLE = 8
_HALF = TILE // 2
# From here on, dequantizing once for all rows is faster than the product that does it for each.
_FEW_ROWS = 32
_BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class Int4Tiles:
    """w = (code - 8) * scale + offset, in float32."""

    tiles: Tensor
    """uint8 [N / 64, K, 32]"""
    scales_offsets: Tensor
    """bfloat16 [G, N, 2]; groups of K / G columns in order, K / G one of `GROUP_SIZES`."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales_offsets.shape[1], self.tiles.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes + self.scales_offsets.nbytes


def int4_linear(
    x: Tensor,
    weight: Int4Tiles,
    bias: Tensor | None,
    scratch: Scratch,
    *,
    few: int = _FEW_ROWS,
    fixed: bool = False,
) -> Tensor:
    """x bfloat16 [M, K] -> [M, N]; sums in float32.

    Up to `few` rows are multiplied by torch's int4 product, in which no row has a part in another's
    result; more by the weight, dequantized block by block and rounded to bfloat16. `fixed`: by that
    product, however many they are.
    """
    outputs, inputs = weight.shape
    if fixed or x.shape[0] <= few:
        size = inputs // weight.scales_offsets.shape[0]
        packed = weight.tiles.view(outputs, inputs // 2)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), packed, size, weight.scales_offsets
        )
        return y if bias is None else y.add_(bias)
    y = x.new_empty(x.shape[0], outputs)
    step = max(_BLOCK_ELEMENTS // inputs // TILE, 1)
    for start in range(0, len(weight.tiles), step):
        tiles = slice(start, min(start + step, len(weight.tiles)))
        rows = slice(tiles.start * TILE, tiles.stop * TILE)
        y[:, rows] = x @ _dequantized(weight, tiles, scratch)
    return y if bias is None else y.add_(bias)


def dequantized_int4(weight: Int4Tiles) -> Tensor:
    """The whole weight rounded to bfloat16, [N, K]: what the product is held to."""
    return _dequantized(weight, slice(0, len(weight.tiles)), Scratch()).t().contiguous()


def _dequantized(weight: Int4Tiles, tiles: slice, scratch: Scratch) -> Tensor:
    """Of a run of tiles: the weight transposed, bfloat16 [K, rows]."""
    stored = weight.tiles[tiles]
    count, inputs, _ = stored.shape
    device, whole = stored.device, (inputs, count, TILE)
    codes = scratch.take("codes", whole, torch.uint8, device)
    by_column = stored.transpose(0, 1)
    torch.bitwise_and(by_column, 15, out=codes[..., :_HALF])
    torch.bitwise_right_shift(by_column, 4, out=codes[..., _HALF:])
    values = scratch.take("values", (inputs, count * TILE), torch.float32, device)
    values.copy_(codes.view(inputs, -1)).sub_(MIDDLE)
    scales, offsets = (
        weight.scales_offsets[:, tiles.start * TILE : tiles.stop * TILE].float().unbind(-1)
    )
    grouped = values.view(scales.shape[0], -1, count * TILE)
    grouped.mul_(scales.unsqueeze(1)).add_(offsets.unsqueeze(1))
    return scratch.take("rounded", values.shape, torch.bfloat16, device).copy_(values)


def to_tiles(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] below 16 -> `Int4Tiles.tiles`."""
    tiles = codes.view(-1, TILE, codes.shape[1])
    return (tiles[:, :_HALF] | tiles[:, _HALF:] << 4).transpose(1, 2).contiguous()


@cache
def usable() -> bool:
    """Whether this CPU has the product, and it takes the layout that is written here."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    codes = (torch.arange(2 * TILE * 64) * 7 // 5 % 16).view(2 * TILE, 64)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return torch.equal(theirs.flatten(), to_tiles(codes.to(torch.uint8)).flatten())
