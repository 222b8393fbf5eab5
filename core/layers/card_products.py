"""Projections, norms and gates whose work a GPU's kernels do, weights as those read them.

Importing this imports Triton: only where a decoder has a card.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Projection
from infopt.core.layers.norm import Norm, RMSNorm
from infopt.core.layers.quantized import QuantizedLinear
from infopt.core.layers.rounded import RoundedLinear
from infopt.kernels.gemm.floats import Fp8Rows, Nf4Rows
from infopt.kernels.gemm.integers import IntegerRows
from infopt.kernels.gpu.fp8_matrix import BLOCK, Fp8Matrix
from infopt.kernels.gpu.fp8_product import FLOAT8_FROM, fp8_linear, fp8_rounded_linear
from infopt.kernels.gpu.gated import ACTIVATIONS, gate
from infopt.kernels.gpu.int8_product import int8_linear, int8_linear_with_outliers
from infopt.kernels.gpu.integer_columns import (
    IntegerColumns,
    joined,
    pack_columns,
    packable_columns,
)
from infopt.kernels.gpu.integer_product import integer_linear
from infopt.kernels.gpu.rms_norm import rms_norm
from infopt.kernels.gpu.rounding import Rounding, round_rows
from infopt.kernels.gpu.tile import Card

_LARGEST_ROW = 65_536
"""Numbers of a row that one program holds in its registers."""


@dataclass(frozen=True, slots=True)
class CardIntegers:
    """As `QuantizedLinear` of integers or NormalFloat, whose weight it does not round where rows
    are few."""

    card: Card
    weight: IntegerColumns
    bias: Tensor | None = None
    columns: Tensor | None = None
    """int32 [K]: the order of x in which the groups' columns are neighbours, where it is not so."""
    fixed: bool = False
    """A row's result never depends on the others."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        rows = as_rows(x)
        if self.columns is not None:
            rows = rows.index_select(1, self.columns)
        y = integer_linear(self.card, rows, self.weight, self.bias, fixed=self.fixed)
        return y.view(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        return self.weight.nbytes + _nbytes(self.bias) + _nbytes(self.columns)


@dataclass(frozen=True, slots=True)
class CardInt8:
    """As `Int8Linear`, the rounding of x in one launch and the product in another."""

    card: Card
    linear: Int8Linear

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        linear, rows = self.linear, as_rows(x)
        form, threshold = linear.activation, linear.activation.outlier_threshold
        static = None if form.dynamic else linear.input_scale
        to = Rounding(torch.int8, form.largest, threshold)
        codes, row_scales = round_rows(self.card, rows, to, static)
        if threshold is None:
            y = self.product(codes, row_scales, x.dtype)
        else:
            y = int8_linear_with_outliers(
                self.card, rows, threshold, codes, row_scales, linear.codes, linear.scales,
                linear.bias, fixed=linear.fixed,
            )  # fmt: skip
        return y.view(*x.shape[:-1], -1)

    @property
    def rounding(self) -> Rounding | None:
        """That of the inputs, where each row's is its own and of nothing but the row's values."""
        form = self.linear.activation
        if not form.dynamic or form.strategy != "token" or form.outlier_threshold is not None:
            return None
        return Rounding(torch.int8, form.largest)

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Of inputs that are rounded, codes [M, K] and scales [M] -> [M, N]."""
        linear = self.linear
        return int8_linear(
            self.card, codes, scales, linear.codes, linear.scales, linear.bias, dtype
        )

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes


@dataclass(frozen=True, slots=True)
class CardFp8:
    """Weights in float8; inputs as they are, or rounded to float8 where there is a format."""

    card: Card
    weight: Fp8Matrix
    bias: Tensor | None = None
    fixed: bool = False
    activation: ActivationFormat | None = None
    input_scale: Tensor | None = None
    """The static scale, [1]."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        rows, form = as_rows(x), self.activation
        if form is None:
            y = fp8_linear(self.card, rows, self.weight, self.bias, fixed=self.fixed)
        else:
            y = self.product(*self.rounded(rows, form), x.dtype)
        return y.view(*x.shape[:-1], -1)

    @property
    def rounding(self) -> Rounding | None:
        """As that of `CardInt8`."""
        form = self.activation
        if form is None or not form.dynamic or form.strategy != "token":
            return None
        return Rounding(torch.float8_e4m3fn, form.largest)

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Of inputs that are rounded, codes [M, K] and scales [M] or [M, K / 128] -> [M, N]."""
        return fp8_rounded_linear(
            self.card, codes, scales, self.weight, self.bias, dtype, fixed=self.fixed
        )

    def rounded(self, rows: Tensor, form: ActivationFormat) -> tuple[Tensor, Tensor]:
        """The codes of x [M, K], and their scales, by row or by 128 of a row."""
        to = Rounding(torch.float8_e4m3fn, form.largest)
        if form.strategy != "group":
            return round_rows(self.card, rows, to, None if form.dynamic else self.input_scale)
        codes, scales = round_rows(self.card, rows.reshape(-1, BLOCK), to)
        return codes.view(rows.shape), scales.view(len(rows), rows.shape[1] // BLOCK)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + _nbytes(self.bias)


@dataclass(frozen=True, slots=True)
class CardNorm:
    """As `RMSNorm`, in one pass."""

    card: Card
    norm: RMSNorm

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(self.card, as_rows(x), self.norm.weight, self.norm.eps).view(x.shape)

    @property
    def nbytes(self) -> int:
        return self.norm.nbytes


@dataclass(frozen=True, slots=True)
class CardGate:
    """activation(gate) * up of [T, 2 * inner], gate before up, rounded once."""

    card: Card
    activation: int

    def __call__(self, x: Tensor) -> Tensor:
        return gate(self.card, x, self.activation)


@dataclass(frozen=True, slots=True)
class CardChoice:
    """Gives a decoder's parts to a GPU's kernels, where there is one for them."""

    card: Card

    def settle(self, projection: Projection) -> Projection:
        """As `card_product`."""
        return card_product(self.card, projection)

    def norm(self, norm: Norm) -> Norm:
        """RMSNorm in one pass; any other as it is."""
        if isinstance(norm, RMSNorm) and norm.weight.numel() <= _LARGEST_ROW:
            return CardNorm(self.card, norm)
        return norm

    def gate(self, activation: str) -> CardGate:
        """By the activation's name in a configuration."""
        return CardGate(self.card, ACTIVATIONS[activation])

    def keep(self) -> None:
        """Nothing was measured."""


def card_product(card: Card, projection: Projection) -> Projection:
    """The projection by the GPU's kernels; what they have no product for stays torch's: dense
    weights, and groups that no word fits or that run on from row to row."""
    match projection:
        case QuantizedLinear():
            return _quantized(card, projection)
        case Int8Linear() if projection.codes.shape[1] <= _LARGEST_ROW:
            return CardInt8(card, replace(projection, codes=projection.codes.contiguous()))
        case RoundedLinear():
            return _rounded(card, projection)
        case SideBySide():
            parts = tuple(card_product(card, part) for part in projection.parts)
            return _as_one(parts) or replace(projection, parts=parts)
    return projection


def _as_one(parts: Sequence[Projection]) -> CardIntegers | None:
    """What had to be stored apart may here be one weight: NormalFloat's blocks are of one row."""
    mine = [part for part in parts if isinstance(part, CardIntegers) and part.columns is None]
    if len(mine) < len(parts):
        return None
    biases = [part.bias for part in mine if part.bias is not None]
    weight = joined([part.weight for part in mine])
    if weight is None or len(biases) not in (0, len(parts)):
        return None
    return replace(mine[0], weight=weight, bias=torch.cat(biases) if biases else None)


def _quantized(card: Card, linear: QuantizedLinear) -> Projection:
    match linear.weight:
        case IntegerRows() as weight:
            groups = weight.scales.shape[1]
            if not packable_columns(weight.bits, weight.inputs, groups):
                return linear
            codes = weight.codes(slice(0, weight.shape[0]), linear.scratch)
            packed = pack_columns(codes, weight.scales, weight.zeros, weight.bits)
            return CardIntegers(card, packed, linear.bias, linear.columns, linear.fixed)
        case Nf4Rows() as weight if weight.shape[1] % weight.block == 0:
            return CardIntegers(card, _nf4(weight), linear.bias, linear.columns, linear.fixed)
        case Fp8Rows() as weight if weight.block in (None, BLOCK):
            scales = weight.scales.float()
            if weight.block is None:
                scales = scales.flatten().expand(weight.shape[0])
            matrix = Fp8Matrix(weight.codes.contiguous(), scales.contiguous())
            return CardFp8(card, matrix, linear.bias, linear.fixed)
    return linear


def _nf4(weight: Nf4Rows) -> IntegerColumns:
    """Its scales are no longer rounded to 8 bits: 9 bytes in place of 8.3 for 16 weights."""
    outputs, inputs = weight.shape
    pairs = weight.codes.view(outputs, inputs // 2)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=2).view(outputs, inputs)
    values = weight.pairs.view(torch.float32).view(16, 16, 2)[:, 0, 0].contiguous()
    return pack_columns(codes, weight.block_absmax().view(outputs, -1), 0, 4, values)


def _rounded(card: Card, rounded: RoundedLinear) -> Projection:
    """Rounded inputs and weights are multiplied in float8 where the GPU can; elsewhere rounded
    inputs meet the weight in their own dtype."""
    linear, form = card_product(card, rounded.linear), rounded.activation
    inputs = linear.weight.shape[1] if isinstance(linear, CardFp8) else 0
    by_row = form.strategy == "token" or (form.strategy == "tensor" and not form.dynamic)
    by_group = form.strategy == "group" and form.group_size == BLOCK and inputs % BLOCK == 0
    if (
        isinstance(linear, CardFp8)
        and form.kind == "float"
        and (by_row or by_group)
        and inputs <= _LARGEST_ROW
        and card.capability >= FLOAT8_FROM
    ):
        scale = None if rounded.input_scale is None else rounded.input_scale.reshape(1).float()
        return replace(linear, activation=form, input_scale=scale)
    return replace(rounded, linear=linear)


def as_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K], whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
