"""What comes before a product in the launch that rounds its inputs to 8 bits: a norm, or a gate.

Importing this imports Triton: only where a decoder has a card.
"""

from dataclasses import dataclass

from torch import Tensor

from infopt.core.layers.card_products import CardFp8, CardGate, CardInt8, CardNorm, as_rows
from infopt.core.layers.linear import Projection
from infopt.kernels.gpu.gated import gate_rounded
from infopt.kernels.gpu.rms_norm import rms_norm_rounded


@dataclass(frozen=True, slots=True)
class Done:
    """In place of a norm, or a gate, that the product behind it does."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    @property
    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class NormedProduct:
    """linear(norm(x)), to the last bit."""

    before: CardNorm
    linear: CardInt8 | CardFp8

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        norm, to, rows = self.before.norm, self.linear.rounding, as_rows(x)
        assert to is not None
        codes, scales = rms_norm_rounded(self.before.card, rows, norm.weight, norm.eps, to)
        return self.linear.product(codes, scales, x.dtype).view(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        return self.before.nbytes + self.linear.nbytes


@dataclass(frozen=True, slots=True)
class GatedProduct:
    """linear(gate(x)), to the last bit."""

    before: CardGate
    linear: CardInt8 | CardFp8

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, 2 * K], gate before up -> [T, N], in the dtype of x."""
        to = self.linear.rounding
        assert to is not None
        codes, scales = gate_rounded(self.before.card, x, self.before.activation, to)
        return self.linear.product(codes, scales, x.dtype)

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes


def together(before: object, linear: Projection) -> NormedProduct | GatedProduct | None:
    """Both as one; None where the one is no kernel's, or the other does not round rows to 8 bits by
    a scale of their own."""
    if not isinstance(linear, CardInt8 | CardFp8) or linear.rounding is None:
        return None
    match before:
        case CardNorm():
            return NormedProduct(before, linear)
        case CardGate():
            return GatedProduct(before, linear)
    return None
