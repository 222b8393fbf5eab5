"""Token embeddings."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """weight [vocabulary, hidden]; ids [T] -> [T, hidden]."""

    weight: Tensor
    scale: float = 1.0

    def __call__(self, token_ids: Tensor) -> Tensor:
        found = F.embedding(token_ids, self.weight)
        return found if self.scale == 1.0 else found.mul_(self.scale)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
