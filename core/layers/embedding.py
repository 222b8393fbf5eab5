"""Token embeddings."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.layers.linear import Linear


class Table(Protocol):
    """A table of vectors, looked up by ids [T] -> [T, width]."""

    def __call__(self, token_ids: Tensor) -> Tensor: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int: ...

    def held_by(self, head: object) -> bool:
        """Whether a head is this table, so that both are in memory once."""
        ...


@dataclass(frozen=True, slots=True)
class Embedding:
    """weight [vocabulary, hidden]; ids [T] -> [T, hidden]."""

    weight: Tensor
    scale: float = 1.0

    def __call__(self, token_ids: Tensor) -> Tensor:
        found = F.embedding(token_ids, self.weight)
        return found if self.scale == 1.0 else found.mul_(self.scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def held_by(self, head: object) -> bool:
        """Whether a head is this table."""
        return isinstance(head, Linear) and head.weight is self.weight
