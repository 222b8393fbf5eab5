"""Attention of queries over a paged cache, appended to a program.

Held to `kernels.attention.paged.paged_attention`, and to rotation and `write_kv` in torch. The
cache is one of `kernels.attention.cache`, in float32, bfloat16 or int8.
"""

import ctypes
from collections.abc import Iterable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kernels.attention.eight_bits import INT8, KvScales
from infopt.kernels.attention.scores import Scores
from infopt.kernels.cpu.program import KINDS, Program

# As in ops/attention.cpp.
_FEW, _FEW_EACH, _MORE_EACH, _MOST_PIECES = 1024, 64, 256, 64
_PADDED = 32
# As in chunks.h.
_CHUNK, _MOST_VECTORS = 8, 64
MOST_DIM = 512
"""Numbers of a head."""


class CacheArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("slots", c_void_p), ("qkv", c_void_p), ("cos", c_void_p),
        ("sin", c_void_p), ("weight", c_void_p), ("cache", c_void_p), ("scales", c_void_p),
        ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("half", c_int64),
        ("row_bytes", c_int64), ("eps", c_float), ("kind", c_int32),
    )  # fmt: skip


class AttendArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("qkv", c_void_p), ("cache", c_void_p), ("positions", c_void_p),
        ("owners", c_void_p), ("tables", c_void_p), ("out", c_void_p), ("parts", c_void_p),
        ("done", c_void_p), ("rounded", c_void_p), ("rounded_stride", c_int64),
        ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("row_bytes", c_int64),
        ("block_size", c_int64), ("width", c_int64), ("splits", c_int64), ("window", c_int64),
        ("scale", c_float), ("cap", c_float), ("kind", c_int32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one layer: queries, then keys, then values side by side, [heads + 2 kv_heads] of them."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Scratch:
    """What pieces of long contexts leave until they are put together, for all layers alike."""

    parts: Tensor
    done: Tensor
    splits: int


def most_pieces(context: int) -> int:
    """Into how many a context of up to so many tokens may be cut."""
    few = -(-min(context, _FEW) // _FEW_EACH)
    return max(few, min(-(-context // _MORE_EACH), _MOST_PIECES))


def alone(lengths: Iterable[int], shape: Heads) -> int:
    """Of rows of requests that have so many each, those that are taken by themselves."""
    chunks = shape.heads <= _MOST_VECTORS * shape.kv_heads
    return sum(length for length in lengths if length < _CHUNK or not chunks)


def new_scratch(capacity: int, shape: Heads, context: int) -> Scratch:
    """For so many rows that are taken by themselves, of contexts of at most `context` tokens."""
    splits = most_pieces(context)
    padded = -(-shape.head_dim // _PADDED) * _PADDED
    each = shape.heads * (padded + 2)
    return Scratch(
        torch.empty(capacity * splits * each, dtype=torch.float32),
        torch.zeros(capacity * shape.kv_heads, dtype=torch.int32),
        splits,
    )


def rotate_and_cache(
    program: Program,
    qkv: Tensor,
    slots: Tensor,
    cache: Tensor,
    shape: Heads,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor, float] | None,
    scales: KvScales | None = None,
) -> None:
    """Norm and rotate queries and keys [capacity, width], in place; write keys and values.

    rotary: cosines and sines [capacity, half] of the first 2 half columns. norm: of each head, its
    weight [heads + kv_heads, head_dim], and epsilon. Scales of another form than the
    cache's are not heeded.
    """
    kind, row = _kind_and_row(cache)
    calibrated = None
    if scales is not None and scales.storage == cache.dtype:
        calibrated = scales.values.float().contiguous()
    cos, sin = rotary if rotary is not None else (None, None)
    weight, eps = norm if norm is not None else (None, 0.0)
    program.append(
        "rotate_and_cache",
        CacheArgs,
        {
            "slots": slots,
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "weight": None if weight is None else weight.float().contiguous(),
            "cache": cache,
            "scales": calibrated,
        },
        {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "half": 0 if cos is None else cos.shape[1],
            "row_bytes": row,
            "eps": eps,
            "kind": kind,
        },
        parts=program.parts(qkv.numel()),
    )


def attend(
    program: Program,
    qkv: Tensor,
    cache: Tensor,
    positions: Tensor,
    owners: Tensor,
    tables: Tensor,
    shape: Heads,
    scores: Scores,
    scratch: Scratch,
) -> Tensor:
    """Attend from each row's query to all up to its position, [capacity, heads * head_dim].

    qkv [capacity, width]; positions int64 [capacity]; tables int32 [requests, blocks]; owners
    int32 [capacity]: whose blocks are a row's. Its own key and value must be in the cache. Rows of
    one request that stand behind one another read its keys and values together.
    """
    assert shape.head_dim <= MOST_DIM and tables.is_contiguous()
    assert tables.dtype == owners.dtype == torch.int32
    kind, row = _kind_and_row(cache)
    out = program.buffer(shape.heads * shape.head_dim)
    program.append(
        "attend",
        AttendArgs,
        {
            "qkv": qkv,
            "cache": cache,
            "positions": positions,
            "owners": owners,
            "tables": tables,
            "out": out,
            "parts": scratch.parts,
            "done": scratch.done,
        },
        {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "row_bytes": row,
            "block_size": cache.shape[1],
            "width": tables.shape[1],
            "splits": scratch.splits,
            "window": scores.window or 0,
            "scale": scores.scale,
            "cap": scores.cap or 0.0,
            "kind": kind,
        },
        parts=program.threads * (8 if program.capacity > 64 else 2),
        out=out,
    )
    return out


def _kind_and_row(cache: Tensor) -> tuple[int, int]:
    assert cache.dtype in (torch.float32, torch.bfloat16, INT8) and cache.is_contiguous()
    return KINDS[cache.dtype], cache.shape[4] * cache.itemsize
