"""`infopt profile --calibrate`: the peaks of this device and its kernels' times, stored."""

from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter

import torch

from infopt.core.hardware.kernel_times import KernelTimes, StepTime, store_kernel_times
from infopt.core.profiling.free_layers import Steps, layer_times
from infopt.core.profiling.kernels import product_times
from infopt.core.profiling.last_level_cache import ASSUMED
from infopt.core.profiling.peaks import cache_bytes, device_peaks
from infopt.core.profiling.predict import layers_seconds
from infopt.core.profiling.shape import ModelShape, shape_of
from infopt.core.profiling.subject import Target
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.reports.profile import CalibrationTable

StepTimer = Callable[[int, int], float]
"""(batch, vocabulary) to the seconds of an engine's decode step on a model of one small layer."""
_BATCHES = (1, 4, 16)
_VOCABULARIES = (1024, 49152)
_LEAST = 1e-6
_CONTEXT = 32
"""About what the small model attends to."""


def calibrate_device(
    target: Target,
    steps: Steps,
    step_timer: StepTimer,
    tiny: Callable[[int], dict[str, object]],
    progress: ProgressCallback,
) -> CalibrationTable:
    """Measure peaks, products, layers and steps in the dtype of `target`, and store them all.

    `steps` computes as the engine does. `tiny`: the config of the model that `step_timer` runs, by
    its vocabulary; what its layer takes is not the step's own.
    """
    began = perf_counter()
    device, dtype = torch.device(target.kind), getattr(torch, target.dtype)
    threads = torch.get_num_threads() if target.kind == "cpu" else 1
    peaks = device_peaks(target.kind, target.name, target.dtype, progress=progress, anew=True)
    cache = cache_bytes(device) or ASSUMED
    products = tuple(product_times(device, dtype, cache_bytes=cache, progress=progress))
    layers = tuple(layer_times(device, dtype, steps, cache_bytes=cache, progress=progress))
    record = KernelTimes(
        device=target.name,
        dtype=target.dtype,
        threads=threads,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        products=products,
        layers=layers,
        conditions={"torch": str(torch.__version__), **peaks.peaks.conditions},
    )
    own = []
    for vocabulary in _VOCABULARIES:
        shape = shape_of(tiny(vocabulary))
        for batch in _BATCHES:
            progress(Progress("measure steps", note=f"{batch} requests, {vocabulary} tokens"))
            seconds = _own(step_timer(batch, vocabulary), record, shape, batch)
            own.append(StepTime(batch=batch, vocab_size=vocabulary, seconds=seconds))
    record = record.model_copy(update={"steps": tuple(own)})
    file = store_kernel_times(record)
    return CalibrationTable(
        file=str(file),
        products=len(products),
        layers=len(layers),
        steps=len(own),
        seconds=perf_counter() - began,
        conditions=dict(record.conditions),
    )


def _own(seconds: float, record: KernelTimes, shape: ModelShape, batch: int) -> float:
    return max(_LEAST, seconds - layers_seconds(record, shape, batch, 1, _CONTEXT))
