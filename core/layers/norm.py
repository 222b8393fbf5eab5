"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm (arXiv 1607.06450)."""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Norm(Protocol):
    """Something over the last dimension."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) * weight over the last dimension, in the dtype of the weight."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of each head's query and key, as in Qwen3: one call for both."""

    weight: Tensor
    """[heads + kv_heads, head_dim]: the query's weight for each query head, then the key's."""
    eps: float

    def __call__(self, query_key: Tensor) -> Tensor:
        wide = query_key.to(self.weight.dtype)
        return F.rms_norm(wide, self.weight.shape[1:], None, self.eps) * self.weight

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
