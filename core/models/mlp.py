"""What follows attention in a layer: an MLP, plain or gated (Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.layers.linear import Projection
from infopt.core.models.config import Activation

Activate = Callable[[Tensor], Tensor]


def activate(kind: Activation) -> Activate:
    """The activation function, which leaves its input as it is."""
    match kind:
        case "silu":
            return F.silu
        case "relu":
            return F.relu
        case "gelu":
            return F.gelu
        case "gelu_tanh":
            return partial(F.gelu, approximate="tanh")


def by_row(activation: Activate) -> Activate:
    """The same, row by row.

    A vector unit rounds an exponential otherwise than the few numbers left over at the end, and
    which those are depends on how many rows there are.
    """

    def each(x: Tensor) -> Tensor:
        return torch.cat([activation(x[row : row + 1]) for row in range(len(x))])

    return each


class FeedForward(Protocol):
    """[T, hidden] -> [T, hidden], token by token."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        ...


@dataclass(frozen=True, slots=True)
class Gate:
    """activation(gate) * up of [T, 2 * inner], gate before up."""

    activation: Activate = F.silu

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.activation(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)), gate and up fused."""

    gate_up: Projection
    down: Projection
    gate: Activate = Gate()

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.gate_up(x)))

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    @property
    def token_bytes(self) -> int:
        return self.nbytes


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """down(activation(up(x)))."""

    up: Projection
    down: Projection
    activation: Activate

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    @property
    def token_bytes(self) -> int:
        return self.nbytes


@dataclass(frozen=True, slots=True)
class ExpertsMLP:
    """The weighted sum of the experts that a token is routed to (Shazeer et al. 2017, 1701.06538).

    Weights are the softmax over all experts, of the `per_token` largest, `normalized` to sum to 1
    or not; in float32.
    """

    router: Projection
    experts: tuple[GatedMLP, ...]
    per_token: int
    normalized: bool

    def __call__(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).float().softmax(-1).topk(self.per_token, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.flatten()
        results = x.new_empty(len(flat), x.shape[-1])
        for number in torch.unique(flat).tolist():
            places = (flat == number).nonzero().squeeze(-1)
            results[places] = self.experts[number](x[places // self.per_token])
        # Each token's own experts in the order of their weights: whatever the others' are.
        results.mul_(weights.to(x.dtype).flatten().unsqueeze(-1))
        return results.view(*chosen.shape, -1).sum(dim=1)

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + sum(expert.nbytes for expert in self.experts)

    @property
    def token_bytes(self) -> int:
        each = sum(expert.nbytes for expert in self.experts) // len(self.experts)
        return self.router.nbytes + self.per_token * each
