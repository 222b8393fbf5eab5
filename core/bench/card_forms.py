"""What `infopt bench kernels` times on a GPU: each op of its kernels, torch's ways, a reference.

Importing this imports Triton.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat
from infopt.core.layers.card_products import CardFp8, CardInt8, CardIntegers
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.kernels.gpu import fp8_matrix, gated, integer_columns, rms_norm
from infopt.kernels.gpu.gated import SILU, gate
from infopt.kernels.gpu.product_examples import float8_weight, integer_weight
from infopt.kernels.gpu.sample import Choosing, sample
from infopt.kernels.gpu.tile import Card

BF16 = torch.bfloat16
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Made:
    """One copy of an op's inputs, and the calls over them."""

    ours: Work
    torchs: Mapping[str, Work]
    reference: Callable[[], Tensor] | None
    """float64; None where results are not numbers that are near one another."""
    nbytes: int
    """Read and written by a call of ours."""
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Product:
    """x [M, K] in bfloat16 by a weight [N, K]."""

    name: str
    kind: str
    """What is multiplied: the dtype whose matrix product is the limit of many rows."""
    tolerance: float
    """Of the largest difference from the reference, as a share of its largest value."""
    layers: Callable[[Card, int, int, torch.device], tuple[Projection, Tensor]]
    """Ours, and the weight that it stands for in float64."""

    def make(self, card: Card, m: int, n: int, k: int, device: torch.device) -> Made:
        layer, whole = self.layers(card, n, k, device)
        x = torch.randn(m, k, device=device).to(BF16)
        dense = Linear(whole.to(BF16))
        torchs: dict[str, Work] = {"F.linear, bfloat16": partial(dense, x)}
        if self.kind == "int8":
            assert isinstance(layer, CardInt8)
            torchs["_int_mm, rounded by torch"] = partial(layer.linear, x)
        moved = layer.nbytes + m * (n + k) * x.element_size()
        wanted = partial(self._reference, layer, x, whole)
        return Made(partial(layer, x), torchs, wanted, moved, 2.0 * m * n * k)

    def _reference(self, layer: Projection, x: Tensor, whole: Tensor) -> Tensor:
        if isinstance(layer, CardInt8):
            return layer.linear(x).double()
        return x.double() @ whole.t()


def _integers(bits: int, group: int | None) -> Callable[..., tuple[Projection, Tensor]]:
    def build(card: Card, n: int, k: int, device: torch.device) -> tuple[Projection, Tensor]:
        weight = integer_weight(n, k, bits, group, False, device)
        return CardIntegers(card, weight), integer_columns.reference(weight)

    return build


def _float8(blocks: bool) -> Callable[..., tuple[Projection, Tensor]]:
    def build(card: Card, n: int, k: int, device: torch.device) -> tuple[Projection, Tensor]:
        weight = float8_weight(n, k, blocks, device)
        weight.codes.copy_(torch.randn(n, k, device=device))
        return CardFp8(card, weight), fp8_matrix.reference(weight)

    return build


def _int8(card: Card, n: int, k: int, device: torch.device) -> tuple[Projection, Tensor]:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scales = torch.rand(n, device=device).add_(0.5)
    linear = Int8Linear(codes, scales, ActivationFormat("int"))
    return CardInt8(card, linear), codes.double() * scales.double()[:, None]


_UNIT = 2**-7
"""Of bfloat16's last place, and the rounding of a weight on the way to the library's product."""
PRODUCTS = (
    Product("W4A16 g128", "bfloat16", 2 * _UNIT, _integers(4, 128)),
    Product("W8A16 channel", "bfloat16", 2 * _UNIT, _integers(8, None)),
    Product("W8A8", "int8", _UNIT, _int8),
    Product("FP8 channel, A16", "bfloat16", 2 * _UNIT, _float8(False)),
    Product("FP8 blocks, A16", "bfloat16", 2 * _UNIT, _float8(True)),
)


@dataclass(frozen=True, slots=True)
class RowOp:
    """Something that is done to each row by itself."""

    name: str
    columns: Sequence[int]
    tolerance: float
    make: Callable[[Card, int, int, torch.device], Made]


def _norm(card: Card, rows: int, columns: int, device: torch.device) -> Made:
    x, stream = torch.randn(2, rows, columns, device=device).to(BF16)
    weight, before = torch.ones(columns, dtype=BF16, device=device), stream.clone()

    def by_torch() -> Tensor:
        return F.rms_norm(stream.add_(x), (columns,), weight, 1e-5)

    return Made(
        lambda: rms_norm.rms_norm(card, x, weight, 1e-5, stream),
        {"add_ and F.rms_norm": by_torch},
        lambda: rms_norm.reference(x, weight, 1e-5, before),
        4 * x.nbytes,
    )


def _gate(card: Card, rows: int, columns: int, device: torch.device) -> Made:
    x = torch.randn(rows, 2 * columns, device=device).to(BF16)
    left, right = x.chunk(2, dim=1)
    return Made(
        lambda: gate(card, x, SILU),
        {"F.silu and mul_": lambda: F.silu(left).mul_(right)},
        lambda: gated.reference(x, SILU),
        3 * x.nbytes // 2,
    )


def _sample(card: Card, rows: int, columns: int, device: torch.device) -> Made:
    logits = torch.randn(rows, columns, device=device) * 3
    how = Choosing(
        temperature=torch.full((rows,), 0.8, device=device),
        top_k=torch.full((rows,), 50, dtype=torch.int32, device=device),
        top_p=torch.full((rows,), 0.9, device=device),
        log_min_p=torch.full((rows,), -torch.inf, device=device),
        uniform=torch.rand(rows, device=device),
    )

    def by_sort() -> Tensor:
        values, order = (logits / 0.8).sort(descending=True)
        values[:, 50:] = -torch.inf
        kept = values.softmax(-1)
        sums = kept.cumsum(-1)
        kept.masked_fill_(sums - kept >= 0.9, 0.0)
        sums = kept.cumsum(-1)
        place = (sums <= how.uniform[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
        return order.gather(1, place)

    return Made(
        lambda: sample(card, logits, how), {"sort": by_sort}, None, logits.nbytes + 8 * rows
    )


ROW_OPS = (
    RowOp("sum and RMSNorm", (4096, 8192), 2 * _UNIT, _norm),
    RowOp("SwiGLU", (14336,), _UNIT, _gate),
    RowOp("sample: top-k 50, top-p 0.9", (128_256,), 0.0, _sample),
)
