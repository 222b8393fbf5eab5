"""The products that `infopt bench kernels` times on a GPU: ours, torch's ways, a reference.

Importing this imports Triton.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from infopt.core.bench import card_torch
from infopt.core.bench.card_made import BF16, UNIT, Made, Work, near
from infopt.core.formats.activation import ActivationFormat
from infopt.core.layers.card_products import CardFp8, CardInt8, CardIntegers
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.kernels.gpu import fp8_matrix, fp8_product, integer_columns
from infopt.kernels.gpu.fp8_matrix import Fp8Matrix
from infopt.kernels.gpu.integer_columns import IntegerColumns
from infopt.kernels.gpu.product_examples import float4_weight, float8_weight, integer_weight
from infopt.kernels.gpu.tile import Card

Multiply = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True)
class Weighted:
    """A weight as our kernels hold it, and as torch's ways do."""

    ours: Projection
    whole: Callable[[], Tensor]
    """The weight in float64, [N, K]."""
    torchs: Mapping[str, Multiply] = field(default_factory=dict)
    reference: Callable[[Tensor], Tensor] | None = None
    """Of the product; where inputs are not rounded, that with the whole weight."""


@dataclass(frozen=True, slots=True)
class Product:
    """x [M, K] in bfloat16 by a weight [N, K]."""

    name: str
    kind: str
    """What is multiplied: the dtype whose matrix product is the limit of many rows."""
    tolerance: float
    """Of the largest difference from the reference, as a share of its largest value."""
    build: Callable[[Card, int, int, torch.device], Weighted]
    since: int = 80
    """The compute capability from which GPUs can do it."""

    def make(self, card: Card, m: int, n: int, k: int, device: torch.device) -> Made:
        held = self.build(card, n, k, device)
        x = torch.randn(m, k, device=device).to(BF16)
        dense = Linear(held.whole().to(BF16))
        torchs: dict[str, Work] = {"F.linear, bfloat16": partial(dense, x)}
        torchs |= {name: partial(way, x) for name, way in held.torchs.items()}
        reference = held.reference or (lambda rows: rows.double() @ held.whole().t())
        return Made(
            ours=partial(held.ours, x),
            torchs=torchs,
            error=lambda: near(held.ours(x), reference(x)),
            nbytes=held.ours.nbytes + m * (n + k) * x.element_size(),
            flops=2.0 * m * n * k,
            same=_tensor,
        )


def _tensor(found: object) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _columns(weight: IntegerColumns, card: Card, torchs: Mapping[str, Multiply]) -> Weighted:
    return Weighted(CardIntegers(card, weight), partial(integer_columns.reference, weight), torchs)


def _integers(bits: int, group: int | None) -> Callable[..., Weighted]:
    def build(card: Card, n: int, k: int, device: torch.device) -> Weighted:
        weight = integer_weight(n, k, bits, group, False, device)
        return _columns(weight, card, card_torch.integer_ways(weight))

    return build


def _float4(card: Card, n: int, k: int, device: torch.device) -> Weighted:
    return _columns(float4_weight(n, k, device), card, {})


def _float8(blocks: bool) -> Callable[..., Weighted]:
    def build(card: Card, n: int, k: int, device: torch.device) -> Weighted:
        weight = float8_weight(n, k, blocks, device)
        weight.codes.copy_(torch.randn(n, k, device=device))
        return Weighted(CardFp8(card, weight), partial(fp8_matrix.reference, weight))

    return build


def _rounded_float8(blocks: bool) -> Callable[..., Weighted]:
    """Float8 by float8: inputs rounded by row, or by 128 of a row."""
    form = ActivationFormat("float", strategy="group" if blocks else "token", group_size=128)

    def build(card: Card, n: int, k: int, device: torch.device) -> Weighted:
        plain = _float8(blocks)(card, n, k, device)
        assert isinstance(plain.ours, CardFp8)
        layer = replace(plain.ours, activation=form)

        def reference(x: Tensor) -> Tensor:
            codes, scales = layer.rounded(x, form)
            return fp8_product.reference(codes, scales, layer.weight, None)

        return replace(
            plain, ours=layer, torchs=_scaled_ways(layer.weight, form), reference=reference
        )

    return build


def _scaled_ways(weight: Fp8Matrix, form: ActivationFormat) -> Mapping[str, Multiply]:
    if weight.blocks:
        return {"_scaled_mm by blocks, rounded by torch": partial(card_torch.scaled_blocks, weight)}
    return {"_scaled_mm by rows, rounded by torch": partial(card_torch.scaled_rows, weight, form)}


def _int8(threshold: float | None) -> Callable[..., Weighted]:
    def build(card: Card, n: int, k: int, device: torch.device) -> Weighted:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        scales = torch.rand(n, device=device).add_(0.5)
        linear = Int8Linear(codes, scales, ActivationFormat("int", outlier_threshold=threshold))
        torchs: dict[str, Multiply] = {"_int_mm, rounded by torch": linear}
        if threshold is None:
            torchs |= card_torch.int8_ways(codes, scales)
        return Weighted(
            CardInt8(card, linear),
            lambda: codes.double() * scales.double()[:, None],
            torchs,
            reference=lambda x: linear(x).double(),
        )

    return build


PRODUCTS = (
    Product("W4A16 g128", "bfloat16", 2 * UNIT, _integers(4, 128)),
    Product("W3A16 g128", "bfloat16", 2 * UNIT, _integers(3, 128)),
    Product("W2A16 g64", "bfloat16", 2 * UNIT, _integers(2, 64)),
    Product("W8A16 channel", "bfloat16", 2 * UNIT, _integers(8, None)),
    Product("NF4", "bfloat16", 2 * UNIT, _float4),
    Product("W8A8", "int8", UNIT, _int8(None)),
    Product("LLM.int8, threshold 4", "int8", UNIT, _int8(4.0)),
    Product("FP8 channel, A16", "bfloat16", 2 * UNIT, _float8(False)),
    Product("FP8 blocks, A16", "bfloat16", 2 * UNIT, _float8(True)),
    Product("FP8 x FP8, by row", "float8", UNIT, _rounded_float8(False), fp8_product.FLOAT8_FROM),
    Product("FP8 x FP8, by block", "float8", UNIT, _rounded_float8(True), fp8_product.FLOAT8_FROM),
)
