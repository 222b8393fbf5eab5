"""The gated MLP (SwiGLU; Shazeer 2020, arXiv 2002.05202)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from infopt.core.layers.linear import Projection


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up fused."""

    gate_up: Projection
    down: Projection

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes
