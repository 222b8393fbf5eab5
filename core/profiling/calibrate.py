"""Measure what this device reaches: bytes per second of reading kernels, FLOP/s of matrix products.

The ceilings are the best of several kernels in the dtype itself: a copy under-counts what the cache
moves to allocate its lines, and at one token a matrix-vector product may read faster or slower
than either. A ceiling that one of the model's own kernels can pass would be no ceiling.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from infopt.core.profiling.timer import repeat_for
from infopt.core.progress import Progress, ProgressCallback, silent

_SMALLEST_BUFFER = 64 * 2**20
_LARGEST_BUFFER = 512 * 2**20
_SIDE = 1024
_ROUNDS = 2
_CALLS_ON_GPU = 20
# (M, N, K) of x [M, K] by W [N, K]: squares, and the shapes of a prefill. Smallest work first.
_PRODUCTS = (
    (256, 1536, 576),
    (512, 1536, 576),
    (512, 2048, 1024),
    (1024, 1024, 1024),
    (256, 4096, 2048),
    (512, 2048, 2048),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
)


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or FLOPs per second of one kernel."""

    kernel: str
    best: float
    median: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reaches in one dtype, kernel by kernel."""

    bandwidth: tuple[Rate, ...]
    """Bytes per second."""
    compute: tuple[Rate, ...]
    """FLOP/s."""
    buffer_bytes: int

    @property
    def reader(self) -> Rate:
        """The kernel of the highest bandwidth."""
        return max(self.bandwidth, key=lambda rate: rate.best)

    @property
    def product(self) -> Rate:
        """The matrix product of the highest rate."""
        return max(self.compute, key=lambda rate: rate.best)


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_bytes: int,
    seconds: float = 10.0,
    progress: ProgressCallback = silent,
) -> Ceilings:
    """Measure with the threads that torch has now, in about `seconds` and their warm-up.

    `cache_bytes` is the last-level cache; each reading kernel goes through four times that, within
    64 to 512 MiB.
    """
    size = min(max(4 * cache_bytes, _SMALLEST_BUFFER), _LARGEST_BUFFER)
    bandwidth = _bandwidth(device, dtype, size, seconds / 2, progress)
    return Ceilings(bandwidth, _compute(device, dtype, seconds / 2, progress), size)


def _bandwidth(
    device: torch.device, dtype: torch.dtype, size: int, seconds: float, progress: ProgressCallback
) -> tuple[Rate, ...]:
    kernels = _reading_kernels(device, dtype, size)
    each = seconds / len(kernels) / _ROUNDS
    rates: dict[str, list[float]] = {name: [] for name in kernels}
    # In rounds, so that a moment's disturbance does not fall on one kernel alone.
    for number in range(_ROUNDS):
        for name, (moved, work) in kernels.items():
            progress(Progress("measure bandwidth", number, _ROUNDS, name))
            whole, calls = complete(work, device)
            times = repeat_for(whole, seconds=each)
            rates[name] += [calls * moved / run for run in times.runs]
    return tuple(_rate(name, found) for name, found in rates.items())


def _reading_kernels(
    device: torch.device, dtype: torch.dtype, size: int
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name to (bytes moved by a call, the call); each goes through one and the same buffer."""
    # Rows that make up whole square layers, halves and thirds.
    rows = size // dtype.itemsize // _SIDE // (6 * _SIDE) * (6 * _SIDE)
    whole = torch.full((rows, _SIDE), 0.5, dtype=dtype, device=device)
    vector = torch.full((_SIDE,), 0.5, dtype=dtype, device=device)
    token, layers = vector[None], whole.view(-1, _SIDE, _SIDE).unbind()
    left, right = whole.view(2, -1).unbind()
    a, b, c = whole.view(3, -1).unbind()
    moved = whole.nbytes
    return {
        "copy": (moved, lambda: left.copy_(right)),
        "triad": (moved, lambda: torch.add(a, b, alpha=0.5, out=c)),
        "sum": (moved, lambda: whole.sum()),
        "dot": (moved, lambda: torch.dot(left, right)),
        "gemv": (moved, lambda: torch.mv(whole, vector)),
        "linear of one token": (moved, lambda: linear(token, whole)),
        "linears of one token": (moved, lambda: [linear(token, weight) for weight in layers]),
    }


def _compute(
    device: torch.device, dtype: torch.dtype, seconds: float, progress: ProgressCallback
) -> tuple[Rate, ...]:
    rates: list[Rate] = []
    drawn = torch.Generator(device).manual_seed(0)
    each = seconds / len(_PRODUCTS)
    for number, (m, n, k) in enumerate(_PRODUCTS):
        flops = 2.0 * m * n * k
        # A shape that takes the time of several is left out, and so are the larger ones.
        expected = flops / max(rate.best for rate in rates) if rates else 0.0
        if expected > each:
            break
        progress(Progress("measure compute", number, len(_PRODUCTS), f"{m}x{n}x{k}"))
        x, weight = (
            torch.randn(rows, k, device=device, generator=drawn).to(dtype) for rows in (m, n)
        )
        work, calls = complete(_product(x, weight), device)
        quick = expected < each / 10
        times = repeat_for(work, seconds=each, warmup=3 if quick else 1, least=3 if quick else 2)
        rates.append(_rate(f"gemm {m}x{n}x{k}", [calls * flops / run for run in times.runs]))
    return tuple(rates)


def _product(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: linear(x, weight)


def _rate(kernel: str, rates: list[float]) -> Rate:
    return Rate(kernel, best=max(rates), median=statistics.median(rates))


def complete(work: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """The work, done when the call returns, and how often a call does it.

    On a GPU often enough that the launch and the waiting do not show.
    """
    if device.type != "cuda":
        return work, 1

    def waiting() -> None:
        for _ in range(_CALLS_ON_GPU):
            work()
        torch.cuda.synchronize(device)

    return waiting, _CALLS_ON_GPU
