"""Integer weights with scales by group, as bytes full of codes, dequantized by rows.

Codes of 4 bits lie two to a byte, of 2 bits four, of 1 bit eight: part i of the row, all of it,
in bit field i of the row's bytes, so that each part is unpacked by one operation on whole bytes.
Codes of 3 bits are a plane of their lower two bits and a plane of the third.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kernels.gemm.scratch import Scratch

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""By the bits of a code: the widths of its planes, the lowest first."""


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """w = (code - zero) * scale."""

    planes: tuple[Tensor, ...]
    """uint8 [N, bytes], as `pack_planes` makes them."""
    scales: Tensor
    """[N, G], of any float dtype; groups of K / G columns in order."""
    zeros: Tensor | int
    """uint8 [N, G], or the one that all groups have."""
    bits: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.inputs

    @property
    def multiple(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        zeros = self.zeros.nbytes if isinstance(self.zeros, Tensor) else 0
        return sum(plane.nbytes for plane in self.planes) + self.scales.nbytes + zeros

    def fill(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """As `Rows.fill`: exactly the float32 values that (codes - zeros) * scales gives."""
        rows = slice(start, start + out.shape[0])
        out.copy_(self.codes(rows, scratch))
        scales = self.scales[rows].float().unsqueeze(-1)
        grouped = out.view(*self.scales[rows].shape, -1)
        if isinstance(self.zeros, int):
            grouped.sub_(self.zeros).mul_(scales)
        else:
            grouped.sub_(self.zeros[rows].float().unsqueeze(-1)).mul_(scales)

    def codes(self, rows: slice, scratch: Scratch) -> Tensor:
        """Of some rows, uint8 [rows, K]; a view of scratch or of the weight."""
        shift, whole = 0, None
        for width, plane in zip(PLANES[self.bits], self.planes, strict=True):
            part = unpack_plane(plane[rows], width, self.inputs, scratch, f"plane {shift}")
            whole = part if whole is None else whole.bitwise_or_(part.bitwise_left_shift_(shift))
            shift += width
        assert whole is not None
        return whole


def pack_planes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes uint8 [N, K] of `bits` bits as planes of full bytes."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    return tuple(planes)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """Codes uint8 [N, K] below 2^width, 8 / width to a byte: [N, ceil(K * width / 8)]."""
    parts = 8 // width
    outputs, inputs = codes.shape
    size = -(-inputs // parts)
    packed = torch.zeros(outputs, size, dtype=torch.uint8, device=codes.device)
    for part in range(parts):
        found = codes[:, part * size : (part + 1) * size]
        packed[:, : found.shape[1]] |= found << (part * width)
    return packed


def unpack_plane(plane: Tensor, width: int, inputs: int, scratch: Scratch, purpose: str) -> Tensor:
    """The codes uint8 [rows, inputs] of bytes [rows, size]: a view of scratch, or of the plane."""
    if width == 8:
        return plane
    rows, size = plane.shape
    parts, mask = 8 // width, (1 << width) - 1
    codes = scratch.take(purpose, (rows, parts * size), torch.uint8, plane.device)
    for part in range(parts):
        target = codes[:, part * size : (part + 1) * size]
        if part == 0:
            torch.bitwise_and(plane, mask, out=target)
            continue
        torch.bitwise_right_shift(plane, part * width, out=target)
        if part < parts - 1:
            target.bitwise_and_(mask)
    return codes[:, :inputs]
