"""Token embeddings."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """weight [vocabulary, hidden]; ids [T] -> [T, hidden]."""

    weight: Tensor

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
