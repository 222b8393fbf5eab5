"""Orthogonal rotations of activations: randomized Hadamard matrices where one of the size exists.

A Hadamard matrix spreads one large value evenly over all, so that no outlier is left, and as a
Kronecker product of small ones it is applied in far less work than a matrix product.
"""

from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Values that are turned at once: 32 MiB in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (F1 x F2 x ...), a Kronecker product; float64."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return len(self.signs)

    def apply(self, rows: Tensor, gain: Tensor | None = None) -> Tensor:
        """rows [..., n] diag(gain) Q, computed in float64 by parts, in the dtype of `rows`."""
        flat = rows.reshape(-1, self.size)
        signs = self.signs if gain is None else self.signs * gain
        out = torch.empty_like(flat)
        step = max(1, _CHUNK // self.size)
        for start in range(0, len(flat), step):
            part = flat[start : start + step].to(torch.float64) * signs
            out[start : start + step] = self._product(part)
        return out.reshape(rows.shape)

    def matrix(self) -> Tensor:
        """Q itself: float64 [n, n]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def _product(self, part: Tensor) -> Tensor:
        rows = len(part)
        for index, factor in enumerate(self.factors):
            after = prod(len(later) for later in self.factors[index + 1 :])
            part = factor.T @ part.reshape(-1, len(factor), after)
        return part.reshape(rows, -1)


def rotation(size: int, seed: int) -> Rotation:
    """A random rotation of `size` dimensions, the same for the same seed.

    Randomized Hadamard (Ashkboos et al. 2024, arXiv 2404.00456) where `hadamard` knows the size,
    else uniform over all orthogonal matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    found = _factors(size)
    if found is None:
        noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
        q, r = torch.linalg.qr(noise)
        return Rotation(r.diagonal().sign(), (q.T.contiguous(),))
    coins = torch.randint(0, 2, (size,), generator=generator)
    return Rotation(
        (2 * coins - 1).to(torch.float64), tuple(part / len(part) ** 0.5 for part in found)
    )


def hadamard(size: int) -> Tensor | None:
    """H with entries +-1 and H H^T = size I, float64; None where no construction here gives one.

    Sylvester's doublings of Paley's matrices of prime fields: all powers of two, and the sizes
    2^k (p + 1) with p = 3 mod 4 and 2^k (2 p + 2) with p = 1 mod 4.
    """
    found = _factors(size)
    if found is None:
        return None
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in found:
        product = torch.kron(product, factor)
    return product


def _factors(size: int) -> tuple[Tensor, ...] | None:
    """Small Hadamard matrices whose Kronecker product has the size."""
    base, doublings = size, 0
    while base % 2 == 0:
        base, doublings = base // 2, doublings + 1
    if base == 1:
        half = doublings // 2
        return _sylvester(half), _sylvester(doublings - half)
    for kept in range(2, doublings + 1):
        core = _paley(base << kept)
        if core is not None:
            return _sylvester(doublings - kept), core
    return None


def _sylvester(doublings: int) -> Tensor:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    product = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        product = torch.kron(product, pair)
    return product


def _paley(size: int) -> Tensor | None:
    """Paley's constructions: size - 1 a prime 3 mod 4 (I), size / 2 - 1 a prime 1 mod 4 (II)."""
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        return _bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if _is_prime(half - 1) and (half - 1) % 4 == 1:
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        identity = torch.eye(half, dtype=torch.float64)
        return torch.kron(_bordered(half - 1, 1.0), ones) + torch.kron(identity, turned)
    return None


def _bordered(prime: int, left: float) -> Tensor:
    """[[0, 1], [left, J]] with Jacobsthal's matrix J: whether i - j is a square modulo `prime`."""
    characters = torch.full((prime,), -1.0, dtype=torch.float64)
    characters[[i * i % prime for i in range(1, prime)]] = 1.0
    characters[0] = 0.0
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = characters[(index[:, None] - index[None, :]) % prime]
    matrix[1:, 0] = left
    matrix[0, 0] = 0.0
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
