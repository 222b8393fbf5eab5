"""Self-attention over a paged cache."""

from dataclasses import dataclass

from torch import Tensor

from infopt.core.layers.linear import Projection
from infopt.core.layers.norm import HeadNorm
from infopt.core.layers.rotary import Rotary
from infopt.kernels.attention.cache import write_kv
from infopt.kernels.attention.eight_bits import KvScales
from infopt.kernels.attention.paged import AttentionPlan, planned_attention


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Where the tokens of one step stand, for every layer alike."""

    rotaries: tuple[Rotary, ...]
    """Of each kind of layer; none where positions are learned."""
    slots: Tensor
    """[T]: the cache slots of the step's tokens."""
    plan: AttentionPlan


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

    def __call__(self, x: Tensor, inputs: AttentionInputs, cache: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; `cache` is this layer's."""
        tokens = x.shape[0]
        qkv = self.qkv(x).view(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        query_key = qkv[:, : self.heads + self.kv_heads]
        if self.head_norm is not None:
            query_key.copy_(self.head_norm(query_key))
        if self.rotary is not None:
            inputs.rotaries[self.rotary].rotate_(query_key)
        write_kv(cache, qkv[:, self.heads :], inputs.slots, self.kv_scales)
        reads = inputs.plan.reads(self.window, fixed=self.fixed)
        attended = planned_attention(qkv[:, : self.heads], cache, reads, self.scale, self.cap)
        return self.output(attended.view(tokens, self.heads * self.head_dim))

    @property
    def nbytes(self) -> int:
        norm = self.head_norm.nbytes if self.head_norm is not None else 0
        return self.qkv.nbytes + self.output.nbytes + norm
