"""`infopt bench kernels` on a GPU: each op beside what the GPU reaches and what torch does.

Inputs take turns, so many copies of them that the cache holds none when its turn comes again; a
pass over all copies is one CUDA graph, timed by the timer that all measurements share. Kernels and
torch's alternatives alternate, pass by pass.
"""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.card import card_of, compiler_versions
from infopt.core.profiling.calibrate import measure_ceilings
from infopt.core.profiling.captured import captured
from infopt.core.profiling.timer import timed
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.reports.kernels import KernelRow, KernelsReport, RowOpRow
from infopt.kernels.gpu.tile import Card

if TYPE_CHECKING:
    from infopt.core.bench.card_forms import Made, Product, RowOp

ROWS = (1, 16, 64, 256, 2048)
SHAPES = ((4096, 4096), (28672, 4096), (8192, 8192))
"""[outputs, inputs]"""
BATCHES = (1, 32, 2048)
"""Rows of what is done row by row; of logits only as many as are chosen from at once."""
_MOST_LOGITS = 256
_PASSES = 9
_MOST_COPIES = 64
_SIDE = 8192
Timer = Callable[[Callable[[], object]], float]


def product_rows(
    card: Card,
    device: torch.device,
    forms: Sequence["Product"],
    rows: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    *,
    cache_bytes: int,
    read: float,
    flops: dict[str, float],
    progress: ProgressCallback,
    timer: Timer = timed,
) -> list[KernelRow]:
    """`read` bytes and `flops` a second, by what is multiplied, are what this GPU reaches."""
    found = []
    for number, form in enumerate(forms):
        for n, k in shapes:
            progress(Progress("measure kernels", number, len(forms), f"{form.name} {n} x {k}"))
            for m in rows:
                copies = _copies(
                    lambda m=m, n=n, k=k, form=form: form.make(card, m, n, k, device),  # type: ignore[misc]
                    cache_bytes,
                )
                seconds, torch_seconds, torch_kernel = _raced(copies, device, timer)
                made, error = copies[0], _error(copies[0])
                found.append(
                    KernelRow(
                        format=form.name, dtype="bfloat16", m=m, n=n, k=k, seconds=seconds,
                        torch_seconds=torch_seconds, torch_kernel=torch_kernel,
                        ratio=torch_seconds / seconds, bytes=made.nbytes,
                        bytes_per_s=made.nbytes / seconds,
                        of_bandwidth=made.nbytes / seconds / read,
                        flops_per_s=made.flops / seconds,
                        of_product=made.flops / seconds / flops[form.kind], error=error,
                        tolerance=form.tolerance, right=error <= form.tolerance,
                    )
                )  # fmt: skip
    return found


def op_rows(
    card: Card,
    device: torch.device,
    ops: Sequence["RowOp"],
    batches: Sequence[int],
    *,
    cache_bytes: int,
    read: float,
    progress: ProgressCallback,
    timer: Timer = timed,
) -> list[RowOpRow]:
    """The same of what is done row by row."""
    found = []
    for number, op in enumerate(ops):
        progress(Progress("measure kernels", number, len(ops), op.name))
        for columns in op.columns:
            fitting = [rows for rows in batches if columns < 2**16 or rows <= _MOST_LOGITS]
            for rows in fitting:
                copies = _copies(
                    lambda op=op, rows=rows, columns=columns: op.make(card, rows, columns, device),  # type: ignore[misc]
                    cache_bytes,
                )
                error = _error(copies[0])
                seconds, torch_seconds, torch_kernel = _raced(copies, device, timer)
                moved = copies[0].nbytes
                found.append(
                    RowOpRow(
                        op=op.name, rows=rows, columns=columns, seconds=seconds,
                        torch_seconds=torch_seconds, torch_kernel=torch_kernel,
                        ratio=torch_seconds / seconds, bytes=moved, bytes_per_s=moved / seconds,
                        of_bandwidth=moved / seconds / read, error=error,
                        tolerance=op.tolerance, right=error <= op.tolerance,
                    )
                )  # fmt: skip
    return found


def _copies(make: Callable[[], "Made"], cache_bytes: int) -> list["Made"]:
    """As many as take twice the cache."""
    first = make()
    count = max(1, min(_MOST_COPIES, -(-2 * cache_bytes // first.nbytes)))
    return [first, *(make() for _ in range(count - 1))]


def _error(made: "Made") -> float:
    """Largest difference from the reference, as a share of its largest value; before the op is
    called again, which may change its inputs."""
    found = made.ours()
    if made.reference is None:
        return 0.0
    assert isinstance(found, torch.Tensor)
    wanted = made.reference()
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def _raced(
    copies: Sequence["Made"], device: torch.device, timer: Timer
) -> tuple[float, float, str]:
    """Median seconds of a call of ours, of the fastest of torch's, and which that is."""
    works = {"ours": captured([made.ours for made in copies], device)}
    for name in copies[0].torchs:
        works[name] = captured([made.torchs[name] for made in copies], device)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_PASSES):
        for name, work in works.items():
            times[name].append(timer(work) / len(copies))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    ours = medians.pop("ours")
    best = min(medians, key=lambda name: medians[name])
    return ours, medians[best], best


def bench_card_kernels(
    *,
    rows: Sequence[int] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    formats: Sequence[str] | None = None,
    progress: ProgressCallback,
) -> KernelsReport:
    """Time what the GPU's kernels do over `shapes` [outputs, inputs] and `rows`.

    With `formats`, those products alone. Raises UnsupportedError without an NVIDIA GPU or Triton,
    UsageError for a format that is not known.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            "there is no NVIDIA GPU here, or no Triton", "pip install 'infopt[triton]' beside a GPU"
        )
    from infopt.core.bench.card_forms import PRODUCTS, ROW_OPS

    known = {form.name: form for form in PRODUCTS}
    for name in formats or ():
        if name not in known:
            raise UsageError(f"no format {name!r}", f"on a GPU: {', '.join(known)}")
    chosen = [known[name] for name in formats or known]
    device = torch.device("cuda", torch.cuda.current_device())
    card, cache_bytes = card_of(device), torch.cuda.get_device_properties(device).L2_cache_size
    with torch.inference_mode():
        ceilings = measure_ceilings(
            device, torch.bfloat16, cache_bytes=cache_bytes, progress=progress
        )
        read = ceilings.reader.best
        flops = {"bfloat16": ceilings.product.best, "int8": _int8_flops(device)}
        products = product_rows(
            card, device, chosen, rows or ROWS, shapes or SHAPES, cache_bytes=cache_bytes,
            read=read, flops=flops, progress=progress,
        )  # fmt: skip
        ops: list[RowOpRow] = []
        if not formats:
            ops = op_rows(
                card, device, ROW_OPS, BATCHES, cache_bytes=cache_bytes, read=read,
                progress=progress,
            )  # fmt: skip
    return KernelsReport(
        isa=f"{compiler_versions()} on {card.name}, sm_{card.capability}",
        threads=torch.get_num_threads(),
        read_bytes_per_s=read,
        product_flops_per_s=flops,
        rows=tuple(products),
        ops=tuple(ops),
        provenance={
            "rows": "measured",
            "ops": "measured",
            "read_bytes_per_s": "measured",
            "product_flops_per_s": "measured",
        },
    )


def _int8_flops(device: torch.device) -> float:
    """Of torch's best product of int8, a large square."""
    x = torch.ones(_SIDE, _SIDE, dtype=torch.int8, device=device)
    work = captured([lambda: torch._int_mm(x, x.t())] * _PASSES, device)
    return _PASSES * 2.0 * _SIDE**3 / min(timed(work) for _ in range(_PASSES))
