"""`infopt bench kernels` on a GPU: each op beside what the GPU reaches and what torch does."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from infopt.core.bench.card_made import Work
from infopt.core.bench.card_race import Rig
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.card import card_of, compiler_versions
from infopt.core.profiling.calibrate import measure_ceilings
from infopt.core.profiling.captured import captured
from infopt.core.profiling.timer import timed
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.reports.kernels import AttentionRow, KernelRow, KernelsReport, RowOpRow

if TYPE_CHECKING:
    from infopt.core.bench.card_attends import Attends
    from infopt.core.bench.card_forms import Product
    from infopt.core.bench.card_ops import RowOp

ROWS = (1, 16, 64, 256, 2048)
SHAPES = ((4096, 4096), (28672, 4096), (8192, 8192))
"""[outputs, inputs]"""
BATCHES = (1, 32, 2048, 8192)
"""Rows of what is done row by row; of logits only as many as are chosen from at once."""
_LOGITS = (1, 16, 64, 256)
_VOCABULARY = 2**16
_CALLS, _SIDE = 9, 8192


def product_rows(
    rig: Rig, forms: Sequence["Product"], rows: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> list[KernelRow]:
    """Every product with each number of rows and each shape."""
    found = []
    for number, form in enumerate(forms):
        for n, k in shapes:
            rig.progress(Progress("measure kernels", number, len(forms), f"{form.name} {n} x {k}"))
            for m in rows:
                make = partial(form.make, rig.card, m, n, k, rig.device)
                name = f"{form.name} {m}x{n}x{k}"
                figures = rig.race(name, make, form.tolerance, form.kind)
                if figures is not None:
                    row = KernelRow(format=form.name, dtype="bfloat16", m=m, n=n, k=k, **figures)
                    found.append(row)
    return found


def op_rows(
    rig: Rig, ops: Sequence["RowOp"], batches: Sequence[int] | None = None
) -> list[RowOpRow]:
    """The same of what is done row by row."""
    found = []
    for number, op in enumerate(ops):
        rig.progress(Progress("measure kernels", number, len(ops), op.name))
        for columns in op.columns:
            for rows in batches or (BATCHES if columns < _VOCABULARY else _LOGITS):
                make = partial(op.make, rig.card, rows, columns, rig.device)
                figures = rig.race(f"{op.name} {rows}x{columns}", make, op.tolerance)
                if figures is not None:
                    found.append(RowOpRow(op=op.name, rows=rows, columns=columns, **figures))
    return found


def attention_rows(rig: Rig, cases: Sequence["Attends"]) -> list[AttentionRow]:
    """The same of attention."""
    found = []
    for number, case in enumerate(cases):
        rig.progress(Progress("measure kernels", number, len(cases), f"attention, {case.name}"))
        context = max(case.contexts)
        figures = rig.race(
            f"attention, {case.name} of {context}", partial(case.make, rig.card, rig.device),
            case.tolerance, "bfloat16",
        )  # fmt: skip
        if figures is None:
            continue
        found.append(
            AttentionRow(
                op=case.name, requests=len(case.lengths), queries=sum(case.lengths),
                context=context, heads=case.heads, kv_heads=case.kv_heads,
                head_dim=case.head_dim, cache=str(case.held).removeprefix("torch."),
                bound=case.bound, **figures,
            )
        )  # fmt: skip
    return found


def bench_card_kernels(
    *,
    rows: Sequence[int] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    formats: Sequence[str] | None = None,
    progress: ProgressCallback,
) -> KernelsReport:
    """Time what the GPU's kernels do, products over `shapes` [outputs, inputs] and `rows`.

    With `formats`, only what has a name that begins with one of them, products, ops and attention
    alike. Raises UnsupportedError without an NVIDIA GPU or Triton, UsageError for a name that
    nothing has.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            "there is no NVIDIA GPU here, or no Triton", "pip install 'infopt[triton]' beside a GPU"
        )
    from infopt.core.bench.card_attends import ATTENDS
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_ops import ROW_OPS

    known = [case.name for group in (PRODUCTS, ROW_OPS, ATTENDS) for case in group]
    check_names(formats, known)
    device = torch.device("cuda", torch.cuda.current_device())
    card, cache_bytes = card_of(device), torch.cuda.get_device_properties(device).L2_cache_size
    with torch.inference_mode():
        ceilings = measure_ceilings(
            device, torch.bfloat16, cache_bytes=cache_bytes, progress=progress
        )
        flops = {"bfloat16": ceilings.product.best, **_small_flops(device, card.capability)}
        rig = Rig(card, device, cache_bytes, ceilings.reader.best, flops, progress)

        def wanted(name: str, since: int = 80) -> bool:
            return card.capability >= since and is_named(name, formats)

        attention = attention_rows(rig, [case for case in ATTENDS if wanted(case.name)])
        products = product_rows(
            rig, [form for form in PRODUCTS if wanted(form.name, form.since)],
            rows or ROWS, shapes or SHAPES,
        )  # fmt: skip
        ops = op_rows(rig, [op for op in ROW_OPS if wanted(op.name, op.since)])
    return card_report(rig, products, ops, attention)


def card_report(
    rig: Rig,
    products: Sequence[KernelRow],
    ops: Sequence[RowOpRow],
    attention: Sequence[AttentionRow],
) -> KernelsReport:
    measured = ("rows", "ops", "attention", "read_bytes_per_s", "product_flops_per_s")
    return KernelsReport(
        isa=f"{compiler_versions()} on {rig.card.name}, sm_{rig.card.capability}",
        threads=torch.get_num_threads(),
        read_bytes_per_s=rig.read,
        product_flops_per_s=dict(rig.flops),
        rows=tuple(products),
        ops=tuple(ops),
        attention=tuple(attention),
        failed=tuple(rig.failed),
        provenance=dict.fromkeys(measured, "measured"),
        warnings=(*rig.failed, *rig.left_out),
    )


def is_named(name: str, wanted: Sequence[str] | None) -> bool:
    """Whether a name begins with one of those that are wanted; all are where none is told."""
    return not wanted or any(name.lower().startswith(word.lower()) for word in wanted)


def check_names(wanted: Sequence[str] | None, known: Sequence[str]) -> None:
    """Raises UsageError for a word that no name begins with."""
    for word in wanted or ():
        if not any(is_named(name, [word]) for name in known):
            raise UsageError(
                f"no format or op {word!r}", f"on a GPU: {', '.join(dict.fromkeys(known))}"
            )


def _small_flops(device: torch.device, capability: int) -> Mapping[str, float]:
    """Of torch's products of 8 bits, a large square: int8, and float8 where the GPU has it."""
    x = torch.ones(_SIDE, _SIDE, dtype=torch.int8, device=device)
    found = {"int8": _flops(device, lambda: torch._int_mm(x, x.t()))}
    if capability >= 89:
        y, one = x.to(torch.float8_e4m3fn), torch.ones((), device=device)
        found["float8"] = _flops(
            device, lambda: torch._scaled_mm(y, y.t(), one, one, out_dtype=torch.bfloat16)
        )
    return found


def _flops(device: torch.device, product: Work) -> float:
    work = captured([product] * _CALLS, device)
    return _CALLS * 2.0 * _SIDE**3 / min(timed(work) for _ in range(_CALLS))
