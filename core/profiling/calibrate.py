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
_LARGEST_BUFFER = 160 * 2**20  # three are held at a time
_SIDE = 1024
_ROUNDS = 2
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
# A shape is left out if one product would take longer: the time is better spent on repeats.
_LONGEST_PRODUCT = 0.3


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

    `cache_bytes` is the last-level cache; each buffer is four times that, within 64 to 160 MiB.
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
            times = repeat_for(_synchronized(work, device), seconds=each)
            rates[name] += [moved / run for run in times.runs]
    return tuple(_rate(name, found) for name, found in rates.items())


def _reading_kernels(
    device: torch.device, dtype: torch.dtype, size: int
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name to (bytes moved by a call, the call); all share three buffers."""
    rows = size // dtype.itemsize // _SIDE // _SIDE * _SIDE
    a, b, c = (torch.full((rows, _SIDE), 0.5, dtype=dtype, device=device) for _ in range(3))
    vector = torch.full((_SIDE,), 0.5, dtype=dtype, device=device)
    token, layers = vector[None], a.view(-1, _SIDE, _SIDE).unbind()
    moved = a.nbytes
    return {
        "copy": (2 * moved, lambda: c.copy_(a)),
        "triad": (3 * moved, lambda: torch.add(a, b, alpha=0.5, out=c)),
        "sum": (moved, lambda: a.sum()),
        "dot": (2 * moved, lambda: torch.dot(a.view(-1), b.view(-1))),
        "gemv": (moved, lambda: torch.mv(a, vector)),
        "linear of one token": (moved, lambda: linear(token, a)),
        "linears of one token": (moved, lambda: [linear(token, weight) for weight in layers]),
    }


def _compute(
    device: torch.device, dtype: torch.dtype, seconds: float, progress: ProgressCallback
) -> tuple[Rate, ...]:
    rates: list[Rate] = []
    for number, (m, n, k) in enumerate(_PRODUCTS):
        flops = 2.0 * m * n * k
        if rates and flops / max(rate.best for rate in rates) > _LONGEST_PRODUCT:
            break
        progress(Progress("measure compute", number, len(_PRODUCTS), f"{m}x{n}x{k}"))
        x, weight = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        work = _synchronized(_product(x, weight), device)
        times = repeat_for(work, seconds=seconds / len(_PRODUCTS))
        rates.append(_rate(f"gemm {m}x{n}x{k}", [flops / run for run in times.runs]))
    return tuple(rates)


def _product(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: linear(x, weight)


def _rate(kernel: str, rates: list[float]) -> Rate:
    return Rate(kernel, best=max(rates), median=statistics.median(rates))


def _synchronized(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work, done when the call returns."""
    if device.type != "cuda":
        return work

    def waiting() -> None:
        work()
        torch.cuda.synchronize(device)

    return waiting
