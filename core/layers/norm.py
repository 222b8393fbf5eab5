"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) * weight over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of each head's query and key, as in Qwen3: one call for both."""

    weight: Tensor
    """[heads + kv_heads, head_dim]: the query's weight for each query head, then the key's."""
    eps: float

    def __call__(self, query_key: Tensor) -> Tensor:
        return F.rms_norm(query_key, self.weight.shape[1:], None, self.eps) * self.weight

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
