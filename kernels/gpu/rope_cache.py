"""All between a fused projection and attention in one launch: norms of heads, rotation, the cache.

Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves split as in Llama.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.attention import eight_bits
from infopt.kernels.attention.eight_bits import FP8, INT8, KvScales
from infopt.kernels.gpu.cache import layout_of
from infopt.kernels.gpu.tile import Card, cdiv, power_of_two


@dataclass(frozen=True, slots=True)
class Turn:
    """By which angles queries and keys are rotated."""

    cos: Tensor
    """[T, ..., dim]: of the first `dim` numbers of a head."""
    sin: Tensor
    """[T, ..., dim], its first half negated."""


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """RMSNorm of each head's query and key."""

    weight: Tensor
    """[heads + kv_heads, head_dim]"""
    eps: float


def reference(
    qkv: Tensor, kv_heads: int, turn: Turn | None, norm: HeadWeights | None
) -> tuple[Tensor, Tensor]:
    """qkv [T, heads + 2 kv_heads, head_dim] -> queries [T, heads, head_dim], and keys, then values,
    [T, 2 kv_heads, head_dim], in float64."""
    rows = qkv.double().clone()
    turned = rows[:, : rows.shape[1] - kv_heads]
    if norm is not None:
        turned *= (turned.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    if turn is not None:
        cos, sin = (x.double().view(len(rows), 1, -1) for x in (turn.cos, turn.sin))
        part = turned[..., : cos.shape[-1]]
        part.copy_(part * cos + part.roll(cos.shape[-1] // 2, -1) * sin)
    heads = rows.shape[1] - 2 * kv_heads
    return rows[:, :heads], rows[:, heads:]


def reference_rows(key_value: Tensor, cache: Tensor, scales: KvScales | None) -> Tensor:
    """What a cache of 8 bits holds of keys and values, in float64."""
    rows = eight_bits.encode(key_value, cache.dtype, scales)
    return eight_bits.decode(rows, key_value.shape[-1], torch.float32).double()


@triton.jit
def _e4m3_bits(x):
    """Float32 up to 448 -> the bits of the nearest e4m3, ties to even."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    # Above 2^-6 the 20 bits that go are rounded off, and the exponents' difference is taken out.
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below, steps are 2^-9 wide; a float of 2^23 has no room for fractions.
    small = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(tl.abs(x) < 0.015625, small, large)
    return tl.where(x < 0, code | 0x80, code)


@triton.jit
def _codes(steps, CODES: tl.constexpr):
    """The nearest codes, ties to even, as int32."""
    if CODES == "int8":
        # A float of 1.5 * 2^23 has no room for fractions.
        steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
        return ((steps + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        return _e4m3_bits(tl.minimum(tl.maximum(steps, -448.0), 448.0))


@triton.jit(do_not_specialize=["stride", "turn_stride"])
def rope_and_cache(
    qkv, cos, sin, weight, slots, cache, cache_scales, fixed_scales, stride, turn_stride, eps,
    token_stride, scale_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr,
    CODES: tl.constexpr, LARGEST: tl.constexpr, FIXED_SCALES: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token; `FIRST` is the first that something happens to."""
    token = tl.program_id(0).to(tl.int64)
    head = FIRST + tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    whole = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    turning = head < HEADS + KV_HEADS
    at = qkv + token * stride + head[:, None] * HEAD_DIM
    x = tl.load(at + d[None, :], mask=whole, other=0.0).to(tl.float32)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
        inverse = tl.where(turning, inverse, 1.0)
        gain_at = weight + head[:, None] * HEAD_DIM
        gained = whole & turning[:, None]
        x *= inverse[:, None] * tl.load(gain_at + d[None, :], mask=gained, other=1.0).to(tl.float32)
    if DIM > 0:
        # Each number's partner, DIM / 2 further on or back.
        other = tl.where(d < DIM // 2, d + DIM // 2, d - DIM // 2)
        rotating = turning[:, None] & (d < DIM)[None, :]
        partner = tl.load(at + other[None, :], mask=rotating, other=0.0).to(tl.float32)
        if NORM:
            gain = tl.load(gain_at + other[None, :], mask=rotating, other=0.0).to(tl.float32)
            partner *= inverse[:, None] * gain
        angle = token * turn_stride + d
        c = tl.load(cos + angle, mask=d < DIM, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=d < DIM, other=0.0).to(tl.float32)
        x = tl.where(rotating, x * c[None, :] + partner * s[None, :], x)
    # All of a row's numbers were read by one warp's threads before one of them is written.
    tl.debug_barrier()
    queries = whole & (head < HEADS)[:, None]
    tl.store(at + d[None, :], x.to(qkv.dtype.element_ty), mask=queries)

    slot = tl.load(slots + token)
    row = head - HEADS
    # Compared as a block: Triton 3.9's interpreter refuses masks that a single number took part in.
    placed = (row >= 0) & (row * 0 + slot >= 0)
    kept = whole & placed[:, None]
    to = cache + slot * token_stride + row[:, None] * HEAD_DIM + d[None, :]
    if CODES == "":
        tl.store(to, x.to(cache.dtype.element_ty), mask=kept)
    else:
        there = (row >= 0) & (row < 2 * KV_HEADS)
        if FIXED_SCALES:
            scale = tl.load(fixed_scales + row, mask=there, other=1.0)
        else:
            scale = tl.max(tl.abs(x), 1) / LARGEST
            scale = tl.where(scale == 0, 1.0, scale)  # where all is zero, any will do but 0
        # What is not finite leaves a row without a finite value.
        scale += tl.sum(0 * x, 1)
        codes = _codes(x / scale[:, None], CODES)
        tl.store(to, codes.to(cache.dtype.element_ty), mask=kept)
        scale_at = cache_scales + slot * scale_stride + row
        tl.store(scale_at, scale, mask=there & placed)


_CODES = {INT8: ("int8", 127.0), FP8: ("float8", 448.0)}
"""How a cache of 8 bits holds numbers, and the largest that there is."""


def rope_and_write(
    card: Card,
    qkv: Tensor,
    kv_heads: int,
    cache: Tensor,
    slots: Tensor,
    turn: Turn | None = None,
    norm: HeadWeights | None = None,
    scales: KvScales | None = None,
) -> None:
    """Norm and rotate queries, in place; norm, rotate and write keys, write values.

    qkv [T, heads + 2 kv_heads, head_dim], heads contiguous; cache as `kernels.gpu.cache` has it;
    slots int64 [T], negative where a token is none. Keys in `qkv` stay as they are. Scales of
    another form than the cache's are not heeded.
    """
    tokens, every, head_dim = qkv.shape
    heads = every - 2 * kv_heads
    layout = layout_of(cache, kv_heads, head_dim)
    codes, largest = _CODES.get(cache.dtype, ("", 1.0))
    calibrated = scales is not None and codes != "" and scales.storage == cache.dtype
    first = heads if turn is None and norm is None else 0
    key = {"heads": every - first, "head_dim": power_of_two(head_dim)}
    tile = card.tile("rope_and_cache", **key)
    block_h = min(tile.constants["BLOCK_H"], power_of_two(every - first))
    rope_and_cache[(tokens, cdiv(every - first, block_h))](
        qkv,
        turn.cos if turn is not None else qkv,
        turn.sin if turn is not None else qkv,
        norm.weight if norm is not None else qkv,
        slots,
        cache,
        layout.scales if layout.scales is not None else cache,
        scales.values if calibrated and scales is not None else slots,
        qkv.stride(0),
        turn.cos.stride(0) if turn is not None else 0,
        norm.eps if norm is not None else 0.0,
        layout.token_stride,
        layout.scale_stride,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
        BLOCK_H=block_h, FIRST=first, DIM=turn.cos.shape[-1] if turn is not None else 0,
        NORM=norm is not None, CODES=codes, LARGEST=largest, FIXED_SCALES=calibrated,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
