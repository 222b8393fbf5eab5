"""Products with integer weights of 2, 3, 4 or 8 bits in groups; the inputs are not rounded.

A code is multiplied as it is, exactly, by a float32 or bfloat16 input; a group's sum in float32 is
then multiplied by its scale. So in float32 a result is that of the dequantized weight, but for the
order of sums. A row's result is the same to the last bit whatever rows stand beside it.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.cpu.dense import PANEL, TYPES, apart, parts
from infopt.kernels.cpu.native import Native, call, in_order

BITS = (2, 3, 4, 8)
BLOCK = 32
"""Inputs whose codes lie together: what a group's size must be a multiple of."""
_TILE = 16
_ELEMENTS = 1 << 20


class GroupsArgs(ctypes.Structure):
    """linear.h's `GroupsArgs`: `linear_groups`."""

    _fields_ = (
        ("x", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("x_type", c_int32),
        ("y_type", c_int32),
        ("scale_type", c_int32),
        ("bits", c_int32),
        ("zero", c_int32),
        ("adds", c_int32),
    )


class GroupSumsArgs(ctypes.Structure):
    """linear.h's `GroupSumsArgs`: `group_sums`."""

    _fields_ = (
        ("x", c_void_p),
        ("sums", c_void_p),
        ("rows", c_void_p),
        ("m", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("x_stride", c_int64),
        ("x_type", c_int32),
    )


@dataclass(frozen=True, slots=True)
class GroupPanels:
    """w = (code - zero) * scale."""

    codes: Tensor
    """int16 [ceil(outputs / 32), inputs / 32, 2, bits, 16, 2], as linear.h says."""
    scales: Tensor
    """float32, float16 or bfloat16 [ceil(outputs / 32), groups, 32]"""
    zeros: Tensor | None
    """uint8, of the same shape; None: all are `zero`."""
    zero: int
    outputs: int

    @property
    def bits(self) -> int:
        return self.codes.shape[3]

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.codes.shape[1] * BLOCK

    @property
    def nbytes(self) -> int:
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros


def packable_groups(bits: int, inputs: int, groups: int) -> bool:
    """Whether `pack_groups` takes codes of this form."""
    return bits in BITS and inputs % groups == 0 and inputs // groups % BLOCK == 0


def pack_groups(codes: Tensor, scales: Tensor, zeros: Tensor | int, bits: int) -> GroupPanels:
    """Codes uint8 [N, K] of `bits` bits, scales [N, G] of any float dtype, zeros uint8 [N, G] or
    the one of all; groups of K / G columns in order."""
    outputs, inputs = codes.shape
    assert packable_groups(bits, inputs, scales.shape[1]), (bits, codes.shape, scales.shape)
    middle = zeros if isinstance(zeros, int) else 1 << (bits - 1)
    scales = scales if scales.dtype in TYPES else scales.float()
    return GroupPanels(
        _pack_codes(_filled(codes), bits),
        _by_panel(_filled(scales)),
        None if isinstance(zeros, int) else _by_panel(_filled(zeros)),
        middle,
        outputs,
    )


def _filled(rows: Tensor) -> Tensor:
    """[N, ...] with rows of zeros up to whole panels."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))


def _by_panel(rows: Tensor) -> Tensor:
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[N, K] -> `GroupPanels.codes`, some panels at a time: what lies between is larger."""
    count, blocks = codes.shape[0] // PANEL, codes.shape[1] // BLOCK
    packed = torch.empty(count, blocks, 2, bits, _TILE, 2, dtype=torch.int16)
    step = max(1, _ELEMENTS // (PANEL * codes.shape[1]))
    for start in range(0, count, step):
        rows = codes[start * PANEL : (start + step) * PANEL]
        # panels, tiles, outputs, blocks, pairs, even or odd -> panels, blocks, tiles, pairs, words
        split = rows.view(-1, 2, _TILE, blocks, BLOCK // 2, 2)
        pairs = split.permute(0, 3, 1, 4, 2, 5).to(torch.int32)
        if bits != 3:
            words = _fields(pairs, bits)
        else:
            words = torch.cat((_fields(pairs & 3, 2), _fields(pairs >> 2, 1)), dim=3)
        # As 16 bits, whatever their sign.
        packed[start : start + step] = (words ^ 0x8000) - 0x8000
    return packed


def _fields(pairs: Tensor, width: int) -> Tensor:
    """Pairs [..., 16 pairs, 16, 2] of `width` bits, 16 / width to a word, the first lowest."""
    each = 16 // width
    split = pairs.reshape(*pairs.shape[:3], -1, each, *pairs.shape[4:])
    shifts = (torch.arange(each, dtype=torch.int32) * width).view(each, 1, 1)
    words: Tensor = (split << shifts).sum(dim=4, dtype=torch.int32)
    return words


def unpack_groups(weight: GroupPanels) -> Tensor:
    """The codes uint8 [N, K] as they were."""
    words = weight.codes.to(torch.int32) & 0xFFFF
    if weight.bits != 3:
        pairs = _unfields(words, weight.bits)
    else:
        pairs = _unfields(words[:, :, :, :2], 2) | _unfields(words[:, :, :, 2:], 1) << 2
    rows = pairs.permute(0, 2, 4, 1, 3, 5).reshape(-1, weight.shape[1])
    return rows[: weight.outputs].to(torch.uint8)


def _unfields(words: Tensor, width: int) -> Tensor:
    each = 16 // width
    shifts = (torch.arange(each, dtype=torch.int32) * width).view(each, 1, 1)
    return ((words.unsqueeze(4) >> shifts) & ((1 << width) - 1)).flatten(3, 4)


def dequantized_groups(weight: GroupPanels) -> Tensor:
    """The whole weight, float32 [N, K]."""
    count = weight.scales.shape[1]
    codes = unpack_groups(weight).float().view(weight.outputs, count, -1)
    zeros: Tensor | int = weight.zero
    if weight.zeros is not None:
        zeros = weight.zeros.transpose(1, 2).reshape(-1, count)[: weight.outputs, :, None].float()
    scales = weight.scales.transpose(1, 2).reshape(-1, count)[: weight.outputs, :, None].float()
    return ((codes - zeros) * scales).view(weight.outputs, -1)


def reference(x: Tensor, weight: GroupPanels, bias: Tensor | None) -> Tensor:
    """What `groups_linear` computes, by torch in float32, rounded once."""
    return F.linear(x.float(), dequantized_groups(weight), bias).to(x.dtype)


def groups_linear(
    native: Native, x: Tensor, weight: GroupPanels, bias: Tensor | None, *, threads: int
) -> Tensor:
    """x float32 or bfloat16 [M, K], bias float32 [N] -> [M, N] in the dtype of x."""
    assert x.shape[1] == weight.shape[1]
    x = apart(x)
    y = x.new_empty(x.shape[0], weight.outputs)
    sums = group_sums_buffer(x, weight)
    args = groups_args(x, weight, bias, y, sums)
    count = parts(len(x), weight.outputs, x.shape[1], threads)
    product = call(native.op("linear_groups", GroupsArgs), args, count)
    if sums is None:
        native.run_one(product, threads)
        return y
    before = group_sums_args(x, weight, sums)
    first = call(
        native.op("group_sums", GroupSumsArgs), before, parts(len(x), x.shape[1], 1, threads)
    )
    native.run(in_order([first, product]), threads)
    return y


def group_sums_buffer(x: Tensor, weight: GroupPanels) -> Tensor | None:
    """float32 [M, groups] for `group_sums`, where the weight has zeros that want it."""
    if weight.zeros is None:
        return None
    return torch.empty(x.shape[0], weight.scales.shape[1], dtype=torch.float32)


def group_sums_args(
    x: Tensor, weight: GroupPanels, sums: Tensor, *, rows: Tensor | None = None
) -> GroupSumsArgs:
    """Of the call before a product with zeros."""
    return GroupSumsArgs(
        x.data_ptr(),
        sums.data_ptr(),
        None if rows is None else rows.data_ptr(),
        x.shape[0],
        x.shape[1],
        weight.group,
        x.stride(0),
        TYPES[x.dtype],
    )


def groups_args(
    x: Tensor,
    weight: GroupPanels,
    bias: Tensor | None,
    y: Tensor,
    sums: Tensor | None,
    *,
    rows: Tensor | None = None,
    adds: bool = False,
) -> GroupsArgs:
    """The arguments of a product into `y`, as `dense_args`; nothing of it is kept alive."""
    return GroupsArgs(
        x.data_ptr(),
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        None if weight.zeros is None else weight.zeros.data_ptr(),
        None if sums is None else sums.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if rows is None else rows.data_ptr(),
        x.shape[0],
        weight.outputs,
        weight.shape[1],
        weight.group,
        x.stride(0),
        y.stride(0),
        TYPES[x.dtype],
        TYPES[y.dtype],
        TYPES[weight.scales.dtype],
        weight.bits,
        weight.zero,
        adds,
    )
