"""The door of `infopt bench kernels`: each native product timed, set against limits and torch."""

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from infopt.core.bench.kernel_forms import FORMS, Form, Pair
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.layers.int8 import int8_product
from infopt.core.profiling.last_level_cache import ASSUMED, last_level_cache
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.reports.kernels import KernelRow, KernelsReport
from infopt.kernels.cpu.native import Native, NativeError, ReadArgs, call, load

ROWS = (1, 8, 64, 512)
SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
"""[outputs, inputs]: the sides of layers of about a billion parameters."""
_SIDE = 1024
_SECONDS = 0.25
_LEAST, _MOST = 3, 40
_BUSY = 1.5


class Limits:
    """What this machine reaches: reading more memory than the cache holds, and torch's products of
    squares. The best of what was seen so far; looked at again and again beside the kernels."""

    def __init__(self, native: Native, threads: int, kinds: Iterable[str]) -> None:
        self._native, self._threads = native, threads
        self._words = torch.ones((last_level_cache() or ASSUMED) // 2, dtype=torch.int64)
        self._sums = torch.zeros(4 * threads, dtype=torch.int64)
        args = ReadArgs(self._words.data_ptr(), len(self._words), self._sums.data_ptr())
        self._call = call(native.op("read", ReadArgs), args, len(self._sums))
        self.read = 0.0
        self.flops = dict.fromkeys(kinds, 0.0)
        for kind in self.flops:
            for _ in range(_LEAST):
                self.look(kind)

    def look(self, kind: str) -> None:
        """Once at each; `kind`: of products, the dtype that is multiplied."""
        seconds = _timed(lambda: self._native.run_one(self._call, self._threads))
        self.read = max(self.read, self._words.nbytes / seconds)
        work = _square_int8 if kind == "int8" else partial(_square, getattr(torch, kind))
        self.flops[kind] = max(self.flops[kind], 2.0 * _SIDE**3 / _timed(work))


def _square(dtype: torch.dtype) -> None:
    x = torch.ones(_SIDE, _SIDE, dtype=dtype)
    torch.nn.functional.linear(x, x)


def _square_int8() -> None:
    x = torch.ones(_SIDE, _SIDE, dtype=torch.int8)
    int8_product(x, x)


def bench_kernels(
    *,
    rows: Sequence[int] = ROWS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    formats: Sequence[str] | None = None,
    threads: int | None = None,
    progress: ProgressCallback,
) -> KernelsReport:
    """Time each format over `shapes` [outputs, inputs] and `rows` of inputs.

    Native and torch's calls take turns, over weights that the cache does not hold. Raises
    UnsupportedError without native kernels, UsageError for a format that is not known.
    """
    try:
        native = load()
    except NativeError as error:
        raise UnsupportedError(str(error), "install a C++ compiler, then infopt anew") from error
    chosen = _chosen(formats)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            return _measured(native, chosen, rows, shapes, progress)
    finally:
        torch.set_num_threads(before)


def kernels_right(report: KernelsReport) -> None:
    """Raises NumericsError where a product, or an op of a GPU, was wrong or could not be run."""
    wrong = [f"{row.format} {row.m}x{row.n}x{row.k}" for row in report.rows if not row.right]
    wrong += [f"{op.op} {op.rows}x{op.columns}" for op in report.ops if not op.right]
    wrong += [f"attention, {one.op} of {one.context}" for one in report.attention if not one.right]
    if wrong:
        raise NumericsError(f"kernels differ from their reference: {', '.join(wrong)}")
    if report.failed:
        raise NumericsError(f"kernels could not be run: {'; '.join(report.failed)}")


def _chosen(formats: Sequence[str] | None) -> tuple[Form, ...]:
    known = {form.name: form for form in FORMS}
    for name in formats or ():
        if name not in known:
            raise UsageError(f"no format {name!r}", f"known: {', '.join(known)}")
    return tuple(known[name] for name in formats or known)


def _measured(
    native: Native,
    forms: Sequence[Form],
    rows: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    progress: ProgressCallback,
) -> KernelsReport:
    threads, load_before = torch.get_num_threads(), os.getloadavg()[0]
    progress(Progress("measure limits"))
    limits = Limits(native, threads, [form.kind for form in forms])
    found: list[tuple[Form, KernelRow]] = []
    for done, form in enumerate(forms):
        for n, k in shapes:
            progress(Progress("measure kernels", done, len(forms), f"{form.name} {n} x {k}"))
            found += [(form, row) for row in _rows(native, form, rows, n, k, limits)]
    busy = f"the load average was {load_before:.1f} with {threads} threads: times may be too long"
    return KernelsReport(
        isa=native.isa,
        threads=threads,
        read_bytes_per_s=limits.read,
        product_flops_per_s=limits.flops,
        rows=tuple(_beside(row, limits.read, limits.flops[form.kind]) for form, row in found),
        provenance={
            "rows": "measured",
            "read_bytes_per_s": "measured",
            "product_flops_per_s": "measured",
        },
        warnings=(busy,) if load_before > _BUSY * threads else (),
    )


def _beside(row: KernelRow, read: float, flops: float) -> KernelRow:
    """Against the best of the whole run, which was not known when the row was measured."""
    shares = {"of_bandwidth": row.bytes_per_s / read, "of_product": row.flops_per_s / flops}
    return row.model_copy(update=shares)


def _timed(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _rows(
    native: Native, form: Form, rows: Sequence[int], n: int, k: int, limits: Limits
) -> Iterator[KernelRow]:
    cache = last_level_cache() or ASSUMED
    first = form.build(native, n, k)
    copies = max(1, min(64, -(-2 * cache // first.native.nbytes)))
    pairs = [first, *(first.copy() for _ in range(copies - 1))]
    for m in rows:
        x = torch.randn(m, k).to(form.dtype)
        error = _error(first.native(x), first.reference(x))
        times = _times(pairs, x)
        limits.look(form.kind)
        seconds, (torch_seconds, torch_kernel) = (
            times.pop("native"),
            min((value, name) for name, value in times.items()),
        )
        moved = first.native.nbytes + m * (n + k) * form.dtype.itemsize
        flops = 2.0 * m * n * k / seconds
        yield KernelRow(
            format=form.name,
            dtype=str(form.dtype).removeprefix("torch."),
            m=m,
            n=n,
            k=k,
            seconds=seconds,
            torch_seconds=torch_seconds,
            torch_kernel=torch_kernel,
            ratio=torch_seconds / seconds,
            bytes=moved,
            bytes_per_s=moved / seconds,
            of_bandwidth=0.0,
            flops_per_s=flops,
            of_product=0.0,
            error=error,
            tolerance=form.tolerance,
            right=error <= form.tolerance,
        )


def _error(found: Tensor, wanted: Tensor) -> float:
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return float(difference)


def _times(pairs: Sequence[Pair], x: Tensor) -> dict[str, float]:
    """Median seconds of a call of each kernel, by name; they take turns, weight after weight."""
    times: dict[str, list[float]] = {}
    began = perf_counter()
    for number in range(_MOST):
        pair = pairs[number % len(pairs)]
        for name, layer in (("native", pair.native), *pair.torchs.items()):
            times.setdefault(name, []).append(_timed(lambda layer=layer: layer(x)))  # type: ignore[misc]
        if number >= _LEAST and perf_counter() - began > _SECONDS:
            break
    # A first call makes ready what is used again.
    return {name: statistics.median(found[1:]) for name, found in times.items()}
