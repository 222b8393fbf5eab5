"""The peaks of this device: measured once, stored with their conditions, used again."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from infopt.core.errors import ResourceError
from infopt.core.hardware.calibration import Calibration, load_calibration, store_calibration
from infopt.core.profiling.calibrate import Ceilings, Rate, measure_ceilings
from infopt.core.profiling.last_level_cache import ASSUMED, last_level_cache
from infopt.core.progress import ProgressCallback, silent
from infopt.core.reports.profile import Peaks
from infopt.core.reports.schema import Origin

_LOAD = "load average before"
# What this process itself did before may count for as much as its threads.
_BUSY = 1.5


@dataclass(frozen=True, slots=True)
class KnownPeaks:
    """Peaks, where they come from, and what is to be said of them."""

    peaks: Peaks
    origin: Origin
    warnings: tuple[str, ...] = ()


def device_peaks(
    device: str,
    name: str,
    dtype: str,
    *,
    progress: ProgressCallback = silent,
    at_least: Peaks | None = None,
    anew: bool = False,
) -> KnownPeaks:
    """The stored peaks of this device, dtype and torch's threads; if there are none, measured now.

    With `at_least` they are measured anew, and each is the higher of both: what was once reached
    can be reached; with `anew` what was stored is not looked at. What is measured is stored.
    """
    threads = torch.get_num_threads() if device == "cpu" else 1
    record, warning = load_calibration(name, dtype, threads)
    told: tuple[str, ...] = () if warning is None else (warning,)
    if record is not None and at_least is None and not anew:
        return KnownPeaks(_as_peaks(record), "calibrated", (*told, *_busy(record)))
    load = _load()
    kind = torch.device(device)
    cache = cache_bytes(kind)
    ceilings = measure_ceilings(
        kind, getattr(torch, dtype), cache_bytes=cache or ASSUMED, progress=progress
    )
    record = Calibration(
        device=name,
        dtype=dtype,
        threads=threads,
        flops_per_s=max(ceilings.product.best, at_least.flops_per_s if at_least else 0),
        bytes_per_s=max(ceilings.reader.best, at_least.bytes_per_s if at_least else 0),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        conditions=_conditions(ceilings, cache, load),
    )
    try:
        store_calibration(record)
    except ResourceError as error:  # the measurement is good, only the next run must repeat it
        told += (f"the measured peaks could not be stored: {error.message}",)
    return KnownPeaks(_as_peaks(record), "measured", (*told, *_busy(record)))


def _busy(record: Calibration) -> tuple[str, ...]:
    """A warning where more ran than the threads that were free for the measurement."""
    load = record.conditions.get(_LOAD, "").split()
    if not load or float(load[0]) <= _BUSY * record.threads:
        return ()
    return (
        f"the peaks were measured at a load average of {load[0]} with {record.threads} threads: "
        "they may be too low, and mfu and mbu too high",
    )


def _as_peaks(record: Calibration) -> Peaks:
    return Peaks(
        device=record.device,
        dtype=record.dtype,
        threads=record.threads,
        flops_per_s=record.flops_per_s,
        bytes_per_s=record.bytes_per_s,
        measured_at=record.measured_at,
        conditions=record.conditions,
    )


def _conditions(ceilings: Ceilings, cache: int | None, load: str) -> dict[str, str]:
    known = f"{cache / 2**20:.0f} MiB" if cache else f"unknown, {ASSUMED / 2**20:.0f} MiB assumed"
    return {
        "torch": str(torch.__version__),
        _LOAD: load,
        "last-level cache": known,
        "buffers": f"{ceilings.buffer_bytes / 2**20:.0f} MiB",
        "best product": ceilings.product.kernel,
        "best reader": ceilings.reader.kernel,
        **{rate.kernel: _words(rate, "GFLOP/s") for rate in ceilings.compute},
        **{rate.kernel: _words(rate, "GB/s") for rate in ceilings.bandwidth},
    }


def _words(rate: Rate, unit: str) -> str:
    return f"best {rate.best / 1e9:.1f}, median {rate.median / 1e9:.1f} {unit}"


def cache_bytes(device: torch.device) -> int | None:
    """Of the last-level cache; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache()


def _load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())
