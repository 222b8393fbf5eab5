"""The door of `infopt quantize --analyze`: what each unit of layers costs at each width."""

import time

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import calibration_tokens
from infopt.core.errors import UsageError
from infopt.core.progress import ProgressCallback, silent
from infopt.core.quantization.job import resolve_job
from infopt.core.quantization.mixed import (
    first_allocation,
    measure_sensitivity,
    sensitivity_tokens,
)
from infopt.core.quantization.plan import memory_of
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.reports.quantize import SensitivityReport
from infopt.core.reports.schema import Plan


def analyze(
    artifact: Artifact, settings: QuantizeSettings, progress: ProgressCallback = silent
) -> SensitivityReport:
    """Measure the KL of every unit alone at each of `mixed_bits`; nothing is written.

    Raises as the quantization itself would for settings, model and memory.
    """
    _check(settings)
    started = time.monotonic()
    job = resolve_job(artifact, settings)
    tokens = calibration_tokens(artifact, settings.calibration, settings.seed)
    rows = measure_sensitivity(job, tokens, None, progress)
    return SensitivityReport(
        model=artifact.summary(),
        provenance={
            "model": "measured",
            "calibration_tokens": "measured",
            "seconds": "measured",
            "allocation": "computed",
            "sensitivity": "measured",
        },
        calibration_tokens=sensitivity_tokens(tokens).numel(),
        seconds=time.monotonic() - started,
        allocation=first_allocation(job, rows),
        sensitivity=rows,
    )


def _check(settings: QuantizeSettings) -> None:
    if settings.scheme != "mixed":
        raise UsageError(
            f"there is nothing to allocate in scheme {settings.scheme}",
            "analyze with --target-bits or --max-ppl-increase, or a recipe that has one",
        )


def plan_analyze(artifact: Artifact, settings: QuantizeSettings) -> Plan:
    """What would be measured, and the memory."""
    _check(settings)
    job = resolve_job(artifact, settings)
    widths = ", ".join(map(str, settings.mixed_bits))
    return Plan(
        command="quantize",
        actions=(
            f"measure every unit of the {len(job.targets)} layers alone at {widths} bits",
            "write nothing but the report",
        ),
        memory_bytes=memory_of(job),
    )
