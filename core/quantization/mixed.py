"""Give layers different bits: measure what each costs, allocate, quantize, and hold the bound."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from infopt.core.artifact.read import read_artifact
from infopt.core.compression.quality import held_out, mean_nll
from infopt.core.errors import GateError
from infopt.core.files import write_atomically
from infopt.core.formats.number import IntegerFormat
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.quantization.allocate import (
    allocate,
    allocate_for_kl,
    mean_bits,
    predicted_kl,
)
from infopt.core.quantization.job import Job, resolve_job
from infopt.core.quantization.made import LayerCheckpoint, Made
from infopt.core.quantization.sensitivity import measure
from infopt.core.recipe.base import Settings
from infopt.core.reports.quantize import Allocation, LayerError, SensitivityRow

Maker = Callable[[Job, Tensor, LayerCheckpoint, ProgressCallback], Made]
SENSITIVITY_TOKENS = 1024
_ROUNDS = 4
_CLOSE = 0.8
"""Using this share of what is allowed is near enough to stop the search."""
_STEPS = 64
"""In which the bound moves to another allocation: a factor of a million."""
_SAVE_EVERY = 16


def make_mixed(
    job: Job, tokens: Tensor, checkpoint: LayerCheckpoint, progress: ProgressCallback, make: Maker
) -> Made:
    """Allocate bits, then quantize by `make`; with a bound on perplexity, until it is kept."""
    rows = measure_sensitivity(job, tokens, checkpoint, progress)
    if job.settings.target_bits is None:
        return _within_bound(job, rows, tokens, checkpoint, progress, make)
    bits = allocate(rows, job.settings.target_bits)
    made = make(_with_bits(job, rows, bits), tokens, checkpoint, progress)
    return replace(made, allocation=_allocation(job, rows, bits))


def measure_sensitivity(
    job: Job, tokens: Tensor, checkpoint: LayerCheckpoint | None, progress: ProgressCallback
) -> tuple[SensitivityRow, ...]:
    """What each unit costs at each width, on the first of the calibration tokens."""
    settings = job.settings
    group_size = next(
        form.group_size
        for scheme in job.schemes.values()
        if isinstance(form := scheme.weight, IntegerFormat)
    )
    place = checkpoint.stage("sensitivity.json") if checkpoint is not None else None
    known: list[SensitivityRow] = []
    if place is not None and place.exists():
        known = [SensitivityRow.model_validate(row) for row in json.loads(place.read_bytes())]

    def keep(row: SensitivityRow) -> None:
        known.append(row)
        if place is not None and len(known) % _SAVE_EVERY == 0:
            write_atomically(place, json.dumps([r.model_dump(mode="json") for r in known]))

    rows = measure(
        job.artifact,
        job.blocks,
        sensitivity_tokens(tokens),
        settings.mixed_bits,
        lambda bits: IntegerFormat(bits, bool(settings.symmetric), group_size),
        mse=settings.grid == "mse",
        # In bfloat16 the noise of the activations hides what a layer at 8 bits costs.
        dtype=torch.float32,
        device=job.device,
        known=tuple(known),
        found=keep,
        progress=progress,
    )
    if place is not None:
        write_atomically(place, json.dumps([r.model_dump(mode="json") for r in rows]))
    return rows


def sensitivity_tokens(tokens: Tensor) -> Tensor:
    """Whole windows of the calibration text, about SENSITIVITY_TOKENS in all."""
    length = min(tokens.shape[1], SENSITIVITY_TOKENS)
    return tokens[: max(1, SENSITIVITY_TOKENS // length), :length]


def first_allocation(job: Job, rows: tuple[SensitivityRow, ...]) -> Allocation:
    """What the target gives, before anything is quantized by it."""
    settings = job.settings
    if settings.target_bits is not None:
        return _allocation(job, rows, allocate(rows, settings.target_bits))
    return _allocation(job, rows, _bits_within(rows, math.log1p(settings.max_ppl_increase or 0.0)))


def _with_bits(job: Job, rows: tuple[SensitivityRow, ...], bits: dict[str, int]) -> Job:
    by_layer = {layer: bits[row.unit] for row in rows for layer in row.layers}
    return resolve_job(job.artifact, job.settings, by_layer)


def _allocation(job: Job, rows: tuple[SensitivityRow, ...], bits: dict[str, int]) -> Allocation:
    return Allocation(
        target_bits=job.settings.target_bits,
        max_ppl_increase=job.settings.max_ppl_increase,
        predicted_kl=predicted_kl(rows, bits),
        mean_bits=mean_bits(rows, bits),
        bits=bits,
    )


class _Best(Settings):
    """The round of fewest bits that kept the bound so far; its artifact lies beside."""

    allocation: Allocation
    rows: tuple[LayerError, ...]
    difference: float


class _Search(Settings):
    """The search for the fewest bits within the bound, as it is kept on disk."""

    bound: float
    """Of the predicted KL that this round allocates by."""
    round: int = 1
    best: _Best | None = None
    tried: tuple[float, ...] = ()
    """The increase of perplexity that each round measured."""
    allocations: tuple[dict[str, int], ...] = ()
    """And what it gave each unit."""


def _within_bound(
    job: Job,
    rows: tuple[SensitivityRow, ...],
    tokens: Tensor,
    checkpoint: LayerCheckpoint,
    progress: ProgressCallback,
    make: Maker,
) -> Made:
    """Rounds of quantizing and measuring: a bound on predicted KL is no bound on perplexity.

    Raises GateError where no round kept the bound.
    """
    share = job.settings.max_ppl_increase
    assert share is not None
    place, kept = checkpoint.stage("search.json"), checkpoint.stage("best")
    search = _Search(bound=math.log1p(share))
    if place.exists():
        search = _Search.model_validate_json(place.read_bytes())
    stream = held_out(job.artifact)
    progress(Progress("measuring the original"))
    base = mean_nll(job.artifact, stream, job.dtype, job.device)
    while search.round <= _ROUNDS and not _near(search, share):
        bits = _untried(rows, search, share)
        if bits is None:
            break
        made = make(_with_bits(job, rows, bits), tokens, checkpoint, progress)
        progress(Progress("measuring perplexity", note=f"round {search.round}"))
        rise = mean_nll(made.staged, stream, job.dtype, job.device) - base
        best = _better(search, made, _allocation(job, rows, bits), math.expm1(rise), share)
        if best is not search.best:
            shutil.rmtree(kept, ignore_errors=True)
            made.staged.path.rename(kept)
        # In this order: a kill before the last line repeats the round, and mixes no two.
        checkpoint.restart("gptq", "training")
        search = _next(search, best, bits, rise, share)
        write_atomically(place, search.model_dump_json())
    if search.best is None:
        raise GateError(
            f"no allocation tried keeps perplexity within {share:+.2%}; measured were "
            + ", ".join(f"{increase:+.2%}" for increase in search.tried),
            "allow more, use a better method, or add a greater width to mixed_bits",
        )
    found = search.best
    final = _with_bits(job, rows, found.allocation.bits)
    allocation = found.allocation.model_copy(update={"rounds": len(search.tried)})
    return Made(read_artifact(kept), final, found.rows, found.difference, allocation)


def _bits_within(rows: tuple[SensitivityRow, ...], bound: float) -> dict[str, int]:
    """The fewest bits within the bound; the most that there are where none reach it."""
    widest = {row.unit: max(r.bits for r in rows if r.unit == row.unit) for row in rows}
    return allocate_for_kl(rows, max(bound, predicted_kl(rows, widest)))


def _near(search: _Search, share: float) -> bool:
    """Whether the last round kept the bound and left little of it unused."""
    return bool(search.tried) and _CLOSE * share <= search.tried[-1] <= share


def _better(
    search: _Search, made: Made, allocation: Allocation, increase: float, share: float
) -> _Best | None:
    """The best round with this one; the earlier one unless this keeps the bound by fewer bits."""
    if increase > share:
        return search.best
    if search.best is not None and search.best.allocation.mean_bits <= allocation.mean_bits:
        return search.best
    measured = allocation.model_copy(update={"measured_ppl_increase": increase})
    return _Best(allocation=measured, rows=made.rows, difference=made.difference)


def _untried(
    rows: tuple[SensitivityRow, ...], search: _Search, share: float
) -> dict[str, int] | None:
    """The first allocation from the bound on that no round had; None where there is no other."""
    bound = search.bound
    step = 0.8 if search.tried and search.tried[-1] > share else 1.25
    for _ in range(_STEPS):
        bits = _bits_within(rows, bound)
        if bits not in search.allocations:
            return bits
        bound *= step
    return None


def _next(
    search: _Search, best: _Best | None, bits: dict[str, int], rise: float, share: float
) -> _Search:
    """The next bound, by how the last prediction was off."""
    allowed = math.log1p(share)
    # Nothing lost, or nothing allowed: there is no measure of how far the prediction was off.
    factor = 0.9 * allowed / max(rise, 0.1 * allowed) if rise > 0 and allowed > 0 else 4.0
    return _Search(
        bound=search.bound * min(4.0, factor),
        round=search.round + 1,
        best=best,
        tried=(*search.tried, math.expm1(rise)),
        allocations=(*search.allocations, bits),
    )
