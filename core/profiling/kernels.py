"""Time this device's products over a grid of shapes, format by format.

Weights are gone through in turn, more of them than the last-level cache holds: so a decode step
meets them. On a CPU they are the calls of one program, with no Python between, where a step would
be replayed so.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import cycle

import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.hardware.kernel_times import ProductTime
from infopt.core.layers.choice import NativeChoice, native_choice
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection, fused
from infopt.core.layers.quantized import pack
from infopt.core.models.record import Unrecordable, product
from infopt.core.profiling.timer import repeat_for
from infopt.core.progress import Progress, ProgressCallback
from infopt.kernels.cpu import elementwise
from infopt.kernels.cpu.native import Native, threads_at_hand
from infopt.kernels.cpu.program import Program
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
_CACHES = 8
"""Times the last-level cache is what weights of one shape take together."""
_GROUP = 64
_RUNS = 7
_RUN = 0.03
"""Seconds that one run through the weights may take."""


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
    weights = several(form, n, k, device, dtype, cache_bytes=cache_bytes, choice=choice)
    last = 0.0
    for m in _ROWS:
        if 2 * last > _LONGEST:
            break
        x = torch.randn(m, k, device=device).to(dtype)
        # Large products are bound by computing: fewer weights tell as much.
        few = weights[: max(1, int(_RUN / max(last, 1e-9)))]
        last = product_time(few, x, None if choice is None else choice.native)
        yield ProductTime(format=form, m=m, n=n, k=k, seconds=last)


def several(
    form: str,
    n: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_bytes: int,
    choice: NativeChoice | None,
) -> list[Projection]:
    """So many weights that next to nothing of one is in the last-level cache when its turn comes.

    Twice what the cache holds is too little: half of that was found there.
    """
    first = build(form, n, k, device, dtype, choice)
    copies = max(1, -(-_CACHES * cache_bytes // first.nbytes))
    another = deepcopy if choice is None else choice.another
    return [first, *(another(first) for _ in range(copies - 1))]


def product_time(weights: Sequence[Projection], x: Tensor, native: Native | None) -> float:
    """Median seconds of a product, the weights used one after the other as an engine uses them."""
    work = _replayed(weights, x, native) if native is not None else None
    if work is None:
        return _one_by_one(weights, x)
    # A weight's first use is slower, by half for packed ones: its pages are new to the core.
    times = repeat_for(work, seconds=0.1, warmup=1, least=_RUNS, most=60)
    return times.median / len(weights)


def _replayed(
    weights: Sequence[Projection], x: Tensor, native: Native
) -> Callable[[], object] | None:
    """All products in one program; None where one of them has no native op."""
    program = Program(native, len(x), min(torch.get_num_threads(), threads_at_hand()))
    program.rows, program.label = len(x), "product"
    width = x.shape[1]
    # What a product reads was made, and rounded, by the op before it: so it is in a step.
    given = elementwise.norm(program, x.float(), torch.ones(width), None, 1e-5)
    try:
        for weight in weights:
            product(program, weight, x.dtype, "product")[1](given, None)
    except Unrecordable:
        return None
    return program.run


def _one_by_one(weights: Sequence[Projection], x: Tensor) -> float:
    """Of single calls, one weight after the other."""
    turn = cycle(weights)

    def once() -> None:
        next(turn)(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    with torch.inference_mode():
        return repeat_for(once, seconds=0.05, warmup=len(weights), least=_RUNS, most=60).median


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
