"""Time this device's kernels over a grid of shapes: products by format, and layers without them.

Weights are gone through in turn, more of them than the last-level cache holds: so a decode step
meets them. What a layer does beside its products is timed with products that cost nothing.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.hardware.kernel_times import LayerTime, ProductTime
from infopt.core.layers.attention import Attention, AttentionInputs
from infopt.core.layers.choice import NativeChoice, native_choice
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection, fused
from infopt.core.layers.norm import RMSNorm
from infopt.core.layers.quantized import pack
from infopt.core.layers.rotary import Rotary
from infopt.core.models.decoder import DecoderLayer
from infopt.core.models.mlp import GatedMLP
from infopt.core.progress import Progress, ProgressCallback
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention
from infopt.kernels.gemm.scratch import Scratch

FORMATS = ("dense", "dense-fused", "W4A16", "W8A16", "W8A8-int8")
"""Of weights, as the runtime holds them; dense ones that were fused lie otherwise in memory."""
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# [outputs, inputs]: wide ones, then the others, each kind from small to large.
_WEIGHTS = (
    (1024, 512), (4096, 512), (8192, 1024), (32768, 1024),
    (512, 512), (512, 2048), (2048, 2048), (2048, 8192),
)  # fmt: skip
_LONGEST = 0.6
"""Seconds: shapes that are expected to take more in one call are left out."""
_GROUP = 64
_RUNS = 7
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class _Given:
    """A projection that costs nothing: its result is there already."""

    output: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.output[: len(x)]

    @property
    def nbytes(self) -> int:
        return 0


def product_times(
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_bytes: int,
    formats: Sequence[str] = FORMATS,
    progress: ProgressCallback,
) -> Iterator[ProductTime]:
    """Median times of products in each format over a grid of shapes, held as an engine would."""
    choice = native_choice("auto", device, dtype, deterministic=False)
    for done, form in enumerate(formats):
        for n, k in _WEIGHTS:
            progress(Progress("measure products", done, len(formats), f"{form} {n} x {k}"))
            yield from _products(form, n, k, device, dtype, cache_bytes, choice)


def _products(
    form: str,
    n: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype,
    cache_bytes: int,
    choice: NativeChoice | None,
) -> Iterator[ProductTime]:
    first = build(form, n, k, device, dtype, choice)
    copies = max(1, min(64, -(-2 * cache_bytes // first.nbytes)))
    more = (build(form, n, k, device, dtype, choice) for _ in range(copies - 1))
    weights = [first, *more]
    last = 0.0
    for m in _ROWS:
        if 2 * last > _LONGEST:
            break
        x = torch.randn(m, k, device=device).to(dtype)
        last = _median(weights, x, device)
        yield ProductTime(format=form, m=m, n=n, k=k, seconds=last)


def _median(weights: Sequence[Projection], x: Tensor, device: torch.device) -> float:
    """Of single calls, one weight after the other."""
    times: list[float] = []
    turn = cycle(weights)
    with torch.inference_mode():
        # A weight's first use is slower, by half for packed ones: its pages are new to the core.
        for weight in weights:
            weight(x)
        began = perf_counter()
        while len(times) < _RUNS or (len(times) < 60 and perf_counter() - began < 0.05):
            weight = next(turn)
            started = perf_counter()
            weight(x)
            _wait(device)
            times.append(perf_counter() - started)
            if len(times) >= 3 and perf_counter() - began > 2 * _LONGEST:
                break
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(
    form: str,
    n: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype,
    choice: NativeChoice | None = None,
) -> Projection:
    """A projection of a format with random weights, held as the runtime holds it; by default
    where it has torch's kernels alone."""
    found: Projection | None
    if form.startswith("dense"):
        dense = Linear(torch.randn(n, k, device=device).to(dtype))
        found = fused([dense]) if form == "dense-fused" else dense
    elif form == "W8A8-int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        scales = torch.full((n,), 0.01, device=device)
        found = Int8Linear(codes, scales, ActivationFormat("int"))
    else:
        found = pack(
            _stored(4 if form == "W4A16" else 8, n, k),
            None,
            dtype=dtype,
            device=device,
            scratch=Scratch(),
            by_rows=choice is not None,
        )
    assert found is not None, form
    return found if choice is None else choice.settle(found)


def _stored(bits: int, n: int, k: int) -> QuantizedWeight:
    """Random codes: 4 bits in groups, 8 by channel."""
    form = IntegerFormat(bits, symmetric=True, group_size=_GROUP if bits == 4 else None)
    groups = form.groups(k)
    return QuantizedWeight(
        codes=torch.randint(0, form.max_code + 1, (n, k), dtype=torch.uint8),
        scales=torch.full((n, groups), 0.01, dtype=torch.float16),
        zeros=torch.full((n, groups), form.middle, dtype=torch.uint8),
        group_index=torch.arange(k, dtype=torch.int32) // (k // groups),
        format=form,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int


_SIZES = (
    _Sizes(512, 1408, 8, 2, 64),
    _Sizes(1024, 2816, 16, 16, 64),
    _Sizes(2048, 5632, 16, 4, 128),
)
# Sequences, new tokens of each, context.
_DECODES = tuple((b, 1, s) for b in (1, 4, 16) for s in (32, 256, 1024))
_PREFILLS = ((1, 32, 32), (1, 128, 128), (1, 512, 512), (1, 1024, 1024), (4, 128, 128))


def layer_times(
    device: torch.device, dtype: torch.dtype, *, progress: ProgressCallback
) -> Iterator[LayerTime]:
    """Median times of a layer without its products, over sizes, batches and contexts."""
    for done, sizes in enumerate(_SIZES):
        for batch, new, context in (*_DECODES, *_PREFILLS):
            note = f"{batch} x {new} tokens at {context}"
            progress(Progress("measure layers", done, len(_SIZES), note))
            seconds = _layer(sizes, batch, new, context, device, dtype)
            yield LayerTime(
                batch=batch,
                new=new,
                context=context,
                hidden=sizes.hidden,
                inner=sizes.inner,
                heads=sizes.heads,
                kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                seconds=seconds,
            )


def _layer(
    sizes: _Sizes, batch: int, new: int, context: int, device: torch.device, dtype: torch.dtype
) -> float:
    tokens, blocks = batch * new, -(-context // _BLOCK)
    layers = [_free_layer(sizes, tokens, device, dtype) for _ in range(4)]
    caches = [
        new_cache(batch * blocks, _BLOCK, sizes.kv_heads, sizes.head_dim, dtype, device).normal_()
        for _ in layers
    ]
    x = torch.randn(tokens, sizes.hidden, device=device).to(dtype)
    positions = torch.arange(context - new, context, device=device).repeat(batch)
    frequencies = torch.rand(sizes.head_dim // 2, device=device)
    tables = [range(row, batch * blocks, batch) for row in range(batch)]
    slots = [
        table[place // _BLOCK] * _BLOCK + place % _BLOCK
        for table in tables
        for place in range(context - new, context)
    ]
    inputs = AttentionInputs(
        (Rotary.at(positions, frequencies, dtype, 1.0),),
        torch.tensor(slots, device=device),
        plan_attention(
            tables,
            [context] * batch,
            [row * new for row in range(batch + 1)],
            _BLOCK,
            dtype,
            device,
        ),
    )
    return _run_layers(layers, x, inputs, caches, device)


def _free_layer(
    sizes: _Sizes, tokens: int, device: torch.device, dtype: torch.dtype
) -> DecoderLayer:
    def given(width: int) -> _Given:
        return _Given(torch.randn(tokens, width, device=device).to(dtype))

    norm = RMSNorm(torch.ones(sizes.hidden, device=device, dtype=dtype), 1e-5)
    vectors = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    attention = Attention(
        qkv=given(vectors),
        output=given(sizes.hidden),
        head_norm=None,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
    )
    return DecoderLayer(
        norm, attention, norm, GatedMLP(given(2 * sizes.inner), given(sizes.hidden))
    )


def _run_layers(
    layers: Sequence[DecoderLayer],
    x: Tensor,
    inputs: AttentionInputs,
    caches: Sequence[Tensor],
    device: torch.device,
) -> float:
    """Median seconds of one layer."""

    def once() -> float:
        y = x.clone()
        started = perf_counter()
        for layer, cache in zip(layers, caches, strict=True):
            y = layer(y, inputs, cache)
        _wait(device)
        return (perf_counter() - started) / len(layers)

    with torch.inference_mode():
        once()
        return statistics.median(_enough(once))


def _enough(once: Callable[[], float]) -> list[float]:
    times: list[float] = []
    began = perf_counter()
    while len(times) < 5 or (len(times) < 40 and perf_counter() - began < 0.08):
        times.append(once())
        if perf_counter() - began > 2 * _LONGEST and len(times) >= 2:
            break
    return times
