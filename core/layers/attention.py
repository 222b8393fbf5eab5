"""Self-attention over a paged cache."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from infopt.core.layers.linear import Projection
from infopt.core.layers.norm import HeadNorm
from infopt.core.layers.rotary import Rotary
from infopt.kernels.attention.cache import write_kv
from infopt.kernels.attention.eight_bits import KvScales
from infopt.kernels.attention.paged import AttentionPlan, planned_attention


class Attending(Protocol):
    """What a step hands to every layer's attention: it knows where the step's tokens stand."""

    def attend(self, layer: "Attention", qkv: Tensor, cache: Tensor) -> Tensor:
        """All between the projections: qkv [T, width] -> [T, heads * head_dim].

        Queries and keys are normed and rotated, keys and values written into the layer's cache.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Where the tokens of one step stand, for every layer alike."""

    rotaries: tuple[Rotary, ...]
    """Of each kind of layer; none where positions are learned."""
    slots: Tensor
    """[T]: the cache slots of the step's tokens."""
    plan: AttentionPlan

    def attend(self, layer: "Attention", qkv: Tensor, cache: Tensor) -> Tensor:
        """At once, in torch: as `Attending` has it."""
        tokens, heads, kv_heads = len(qkv), layer.heads, layer.kv_heads
        qkv = qkv.view(tokens, heads + 2 * kv_heads, layer.head_dim)
        query_key = qkv[:, : heads + kv_heads]
        if layer.head_norm is not None:
            query_key.copy_(layer.head_norm(query_key))
        if layer.rotary is not None:
            self.rotaries[layer.rotary].rotate_(query_key)
        write_kv(cache, qkv[:, heads:], self.slots, layer.kv_scales)
        reads = self.plan.reads(layer.window, fixed=layer.fixed)
        attended = planned_attention(qkv[:, :heads], cache, reads, layer.scale, layer.cap)
        return attended.view(tokens, heads * layer.head_dim)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention, projections fused; writes the new keys and values, then attends."""

    qkv: Projection
    output: Projection
    head_norm: HeadNorm | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Of the scores."""
    rotary: int | None = 0
    """Which of the step's rotaries; None where positions are learned."""
    window: int | None = None
    """Tokens to look back on, itself included."""
    cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    kv_scales: KvScales | None = None
    """Calibrated ones, for a cache in 8 bits."""
    fixed: bool = False
    """In calls whose shapes do not depend on what else is in the step."""

    def __call__(self, x: Tensor, inputs: Attending, cache: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; `cache` is this layer's."""
        return self.output(inputs.attend(self, self.qkv(x), cache))

    @property
    def nbytes(self) -> int:
        norm = self.head_norm.nbytes if self.head_norm is not None else 0
        return self.qkv.nbytes + self.output.nbytes + norm
