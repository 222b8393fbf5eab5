"""One decoder for Llama, Mistral, Qwen2 and Qwen3: a forward pass over a ragged batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.layers.attention import Attention, AttentionInputs
from infopt.core.layers.embedding import Embedding
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.norm import RMSNorm
from infopt.core.layers.rotary import Rotary
from infopt.core.models.config import ModelConfig
from infopt.core.models.mlp import GatedMLP
from infopt.kernels.attention.paged import AttentionPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of one step, those of all requests behind one another."""

    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]: where in the cache their keys and values go."""
    plan: AttentionPlan


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    input_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(self, x: Tensor, inputs: AttentionInputs, cache: Tensor) -> Tensor:
        """x [T, hidden], which is added to in place."""
        x.add_(self.attention(self.input_norm(x), inputs, cache))
        return x.add_(self.mlp(self.mlp_norm(x)))

    @property
    def nbytes(self) -> int:
        parts = (self.input_norm, self.attention, self.mlp_norm, self.mlp)
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Weights and the forward pass; the cache belongs to the caller."""

    config: ModelConfig
    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Projection
    frequencies: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that each decode step reads: all but an untied embedding table."""
        return sum(layer.nbytes for layer in self.layers) + self.norm.nbytes + self.head.nbytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights in memory, a tied table once."""
        tied = isinstance(self.head, Linear) and self.head.weight is self.embedding.weight
        return self.step_bytes + (0 if tied else self.embedding.nbytes)

    def __call__(self, inputs: StepInputs, caches: Sequence[Tensor]) -> Tensor:
        """Fill the caches, one a layer; return hidden states [T, hidden] before the last norm."""
        rotary = Rotary.at(inputs.positions, self.frequencies, self.dtype)
        attention = AttentionInputs(rotary, inputs.slots, inputs.plan)
        x = self.embedding(inputs.token_ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, attention, cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocabulary], for the rows that need them only."""
        return self.head(self.norm(hidden))
