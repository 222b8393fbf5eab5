"""What is done row by row between products, as `infopt bench kernels` times it on a GPU.

Importing this imports Triton.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.bench.card_made import (
    BF16,
    F8,
    FLOAT8_STEP,
    INT8_STEP,
    UNIT,
    Made,
    near,
    ways,
)
from infopt.kernels.attention import eight_bits
from infopt.kernels.gpu import gated, rms_norm, rope_cache, rounding
from infopt.kernels.gpu.cache import decoded, new_cache
from infopt.kernels.gpu.gated import SILU, gate, gate_rounded
from infopt.kernels.gpu.rope_cache import Turn, rope_and_write
from infopt.kernels.gpu.rounding import Rounding, round_rows
from infopt.kernels.gpu.sample import Choosing, sample
from infopt.kernels.gpu.tile import Card

_INT8, _FLOAT8 = Rounding(torch.int8, 127.5), Rounding(F8, 448.0)
_HEAD = 128
_EPS = 1e-5
_SURE = 1e-4
"""How far a token's share of the distribution may be from the number drawn: float32 sums."""


@dataclass(frozen=True, slots=True)
class RowOp:
    """Something that is done to each row by itself."""

    name: str
    columns: Sequence[int]
    tolerance: float
    make: Callable[[Card, int, int, torch.device], Made]
    since: int = 80


def _rounds(to: Rounding) -> tuple[float, int]:
    """The tolerance of a rounded result, one step, and the GPUs that have the format."""
    return (INT8_STEP, 80) if to.dtype == torch.int8 else (FLOAT8_STEP, 89)


def _values(found: tuple[Tensor, Tensor]) -> Tensor:
    codes, scales = found
    return codes.double() * scales.double()[:, None]


def _norm(to: Rounding | None) -> Callable[[Card, int, int, torch.device], Made]:
    def by_torch(x: Tensor, stream: Tensor, weight: Tensor) -> object:
        found = F.rms_norm(stream.add_(x), (x.shape[1],), weight, _EPS)
        return found if to is None else rounding.reference(found, to)

    def make(card: Card, rows: int, columns: int, device: torch.device) -> Made:
        x, stream = torch.randn(2, rows, columns, device=device).to(BF16).unbind()
        weight = torch.rand(columns, device=device).add_(0.5).to(BF16)

        def ours() -> object:
            if to is None:
                return rms_norm.rms_norm(card, x, weight, _EPS, stream)
            return rms_norm.rms_norm_rounded(card, x, weight, _EPS, to, stream)

        def error() -> float:
            before = stream.clone()
            found: Any = ours()
            wanted = rms_norm.reference(x, weight, _EPS, before)
            return near(found if to is None else _values(found), wanted)

        written = x.nbytes if to is None else x.numel() + 4 * rows
        torchs = ways("add_ and F.rms_norm", by_torch, x, stream, weight, device=device)
        return Made(ours, torchs, error, 3 * x.nbytes + written)

    return make


def _gate(to: Rounding | None) -> Callable[[Card, int, int, torch.device], Made]:
    def by_torch(x: Tensor) -> object:
        left, right = x.chunk(2, dim=1)
        found = F.silu(left).mul_(right)
        return found if to is None else rounding.reference(found, to)

    def make(card: Card, rows: int, columns: int, device: torch.device) -> Made:
        x = torch.randn(rows, 2 * columns, device=device).to(BF16)

        def ours() -> object:
            return gate(card, x, SILU) if to is None else gate_rounded(card, x, SILU, to)

        def error() -> float:
            found: Any = ours()
            return near(found if to is None else _values(found), gated.reference(x, SILU))

        written = x.nbytes // 2 if to is None else x.numel() // 2 + 4 * rows
        torchs = ways("F.silu and mul_", by_torch, x, device=device)
        return Made(ours, torchs, error, x.nbytes + written)

    return make


def _round(to: Rounding) -> Callable[[Card, int, int, torch.device], Made]:
    def by_torch(x: Tensor) -> object:
        return rounding.reference(x, to)

    def make(card: Card, rows: int, columns: int, device: torch.device) -> Made:
        x = torch.randn(rows, columns, device=device).to(BF16)
        return Made(
            lambda: round_rows(card, x, to),
            ways("amax, div and to", by_torch, x, device=device),
            lambda: near(_values(round_rows(card, x, to)), x.double()),
            x.nbytes + x.numel() + 4 * rows,
        )

    return make


def _rope(held: torch.dtype) -> Callable[[Card, int, int, torch.device], Made]:
    """Of columns / 128 heads a sixth are keys, a sixth values, as Llama-3-8B has it."""

    def by_torch(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> object:
        kv_heads = cache.shape[1] // 2
        heads = qkv.shape[1] - 2 * kv_heads
        turned, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        turned = turned * cos + turned.roll(_HEAD // 2, -1) * sin
        qkv[:, :heads] = turned[:, :heads]
        rows = torch.cat((turned[:, heads:], values), 1)
        if cache.dtype != BF16:
            rows = eight_bits.encode(rows, cache.dtype, None)
        cache[slots] = rows
        return cache

    def make(card: Card, rows: int, columns: int, device: torch.device) -> Made:
        every = columns // _HEAD
        kv_heads = max(1, every // 6)
        qkv = torch.randn(rows, every, _HEAD, device=device).to(BF16)
        angle = torch.rand(rows, 1, _HEAD // 2, device=device).mul_(6.0)
        cos = torch.cat((angle.cos(), angle.cos()), -1).to(BF16)
        sin = torch.cat((-angle.sin(), angle.sin()), -1).to(BF16)
        blocks = -(-rows // 16)
        slots = torch.randperm(blocks * 16, device=device)[:rows]
        cache = new_cache(blocks, 16, kv_heads, _HEAD, held, device)
        stored = eight_bits.STORAGE.get(held, held)
        wide = _HEAD if stored == held == BF16 else eight_bits.row_bytes(_HEAD)
        others = torch.zeros(blocks * 16, 2 * kv_heads, wide, dtype=stored, device=device)

        def ours() -> object:
            rope_and_write(card, qkv, kv_heads, cache, slots, Turn(cos, sin))
            return qkv

        def error() -> float:
            query, key_value = rope_cache.reference(qkv, kv_heads, Turn(cos, sin), None)
            ours()
            kept = decoded(cache, kv_heads, _HEAD)[slots]
            return max(near(qkv[:, : query.shape[1]], query), near(kept, key_value))

        moved = 2 * rows * (every - 2 * kv_heads) * _HEAD * 2 + 2 * rows * 2 * kv_heads * _HEAD
        moved += rows * 2 * kv_heads * (_HEAD * cache.element_size() + (4 if held != BF16 else 0))
        torchs = ways("mul, roll and index_put_", by_torch, qkv, cos, sin, slots, others,
                      device=device)  # fmt: skip
        return Made(ours, torchs, error, moved + slots.nbytes + cos.nbytes + sin.nbytes)

    return make


def _by_sort(logits: Tensor, uniform: Tensor) -> Tensor:
    values, order = (logits / 0.8).sort(descending=True)
    values[:, 50:] = -torch.inf
    kept = values.softmax(-1)
    sums = kept.cumsum(-1)
    kept.masked_fill_(sums - kept >= 0.9, 0.0)
    sums = kept.cumsum(-1)
    place = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
    return order.gather(1, place)


def _sample(card: Card, rows: int, columns: int, device: torch.device) -> Made:
    logits = torch.randn(rows, columns, device=device) * 3
    how = Choosing(
        temperature=torch.full((rows,), 0.8, device=device),
        top_k=torch.full((rows,), 50, dtype=torch.int32, device=device),
        top_p=torch.full((rows,), 0.9, device=device),
        log_min_p=torch.full((rows,), -torch.inf, device=device),
        uniform=torch.rand(rows, device=device),
    )
    return Made(
        lambda: sample(card, logits, how),
        ways("sort", _by_sort, logits, how.uniform, device=device),
        lambda: sampling_error(sample(card, logits, how), logits, how),
        logits.nbytes + 8 * rows,
    )


def sampling_error(tokens: Tensor, logits: Tensor, how: Choosing) -> float:
    """How far the numbers drawn are from the tokens' shares of the distribution, in the order of
    the vocabulary; infinite where a token is none that may be chosen."""
    from infopt.kernels.gpu import sample as kernel

    probabilities = kernel.reference(logits, how)
    own = probabilities.gather(1, tokens[:, None].clamp(min=0)).squeeze(1)
    if bool(((tokens < 0) | (own <= 0)).any()):
        return float("inf")
    upper = probabilities.cumsum(1).gather(1, tokens[:, None]).squeeze(1)
    drawn = how.uniform.double()
    return float(torch.maximum(drawn - upper, upper - own - drawn).clamp(min=0).max())


def _rounded_op(
    name: str,
    columns: Sequence[int],
    to: Rounding,
    make: Callable[[Card, int, int, torch.device], Made],
) -> RowOp:
    """Half a step is the rounding's own; the other half the value's that is rounded."""
    tolerance, since = _rounds(to)
    return RowOp(name, columns, tolerance, make, since)


_HIDDEN, _INNER, _HEADS, _VOCABULARY = (4096, 8192), (14336,), (6144,), (128_256,)
ROW_OPS = (
    RowOp("sum and RMSNorm", _HIDDEN, 2 * UNIT, _norm(None)),
    _rounded_op("sum and RMSNorm to int8", _HIDDEN, _INT8, _norm(_INT8)),
    _rounded_op("sum and RMSNorm to float8", _HIDDEN, _FLOAT8, _norm(_FLOAT8)),
    RowOp("SwiGLU", _INNER, UNIT, _gate(None)),
    _rounded_op("SwiGLU to int8", _INNER, _INT8, _gate(_INT8)),
    _rounded_op("SwiGLU to float8", _INNER, _FLOAT8, _gate(_FLOAT8)),
    _rounded_op("rows to int8", _HIDDEN, _INT8, _round(_INT8)),
    _rounded_op("rows to float8", _HIDDEN, _FLOAT8, _round(_FLOAT8)),
    RowOp("rotation and cache", _HEADS, UNIT, _rope(BF16)),
    RowOp("rotation and cache to int8", _HEADS, INT8_STEP, _rope(torch.int8)),
    RowOp("rotation and cache to float8", _HEADS, FLOAT8_STEP, _rope(F8)),
    RowOp("sample: top-k 50, top-p 0.9", _VOCABULARY, _SURE, _sample),
)
