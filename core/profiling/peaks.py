"""The peaks of this device: measured once, stored with their conditions, used again."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from infopt.core.hardware.calibration import Calibration, load_calibration, store_calibration
from infopt.core.profiling.calibrate import Ceilings, measure_ceilings
from infopt.core.profiling.last_level_cache import ASSUMED, last_level_cache
from infopt.core.progress import ProgressCallback, silent
from infopt.core.reports.profile import Peaks
from infopt.core.reports.schema import Origin


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
) -> KnownPeaks:
    """The stored peaks of this device, dtype and torch's threads; measured and stored if there are none.

    With `at_least` they are measured anew, and each is the higher of both: what was once reached can
    be reached.
    """
    threads = torch.get_num_threads() if device == "cpu" else 1
    record, warning = load_calibration(name, dtype, threads)
    warnings = () if warning is None else (warning,)
    if record is not None and at_least is None:
        return KnownPeaks(_as_peaks(record), "calibrated", warnings)
    load = _load()
    kind = torch.device(device)
    cache = _cache_bytes(kind)
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
    store_calibration(record)
    return KnownPeaks(_as_peaks(record), "measured", warnings)


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
    reader, product = ceilings.reader, ceilings.product
    known = f"{cache / 2**20:.0f} MiB" if cache else f"unknown, {ASSUMED / 2**20:.0f} MiB assumed"
    return {
        "torch": str(torch.__version__),
        "load average before": load,
        "last-level cache": known,
        "buffers": f"{ceilings.buffer_bytes / 2**20:.0f} MiB",
        "best reader": f"{reader.kernel} ({reader.best / 1e9:.1f} GB/s, median {reader.median / 1e9:.1f})",
        "best product": f"{product.kernel} ({product.best / 1e9:.0f} GFLOP/s, median {product.median / 1e9:.0f})",
        **{rate.kernel: f"{rate.best / 1e9:.1f} GB/s" for rate in ceilings.bandwidth},
    }


def _cache_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache()


def _load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())
