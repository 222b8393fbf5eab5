"""Whether a device still does what it did when it was calibrated."""

import torch

from infopt.core.hardware.kernel_times import KernelTimes
from infopt.core.layers.choice import native_choice
from infopt.core.profiling.kernels import product_time, several
from infopt.core.profiling.last_level_cache import ASSUMED
from infopt.core.profiling.peaks import cache_bytes
from infopt.core.reports.profile import Drift

# One that reads a weight larger than most caches, one that computes.
_READING, _COMPUTING = (1, 32768, 1024), (256, 2048, 2048)


def drift(kernels: KernelTimes, device: torch.device) -> Drift | None:
    """Two products now over what they took then; None where they were not measured."""
    reading = _share(kernels, device, *_READING)
    computing = _share(kernels, device, *_COMPUTING)
    if reading is None or computing is None:
        return None
    return Drift(reading=reading, computing=computing, calibrated_at=kernels.measured_at)


def _share(kernels: KernelTimes, device: torch.device, m: int, n: int, k: int) -> float | None:
    same = (one for one in kernels.products if (one.m, one.n, one.k) == (m, n, k))
    then = next((one.seconds for one in same if one.format == "dense"), None)
    if then is None:
        return None
    dtype = getattr(torch, kernels.dtype)
    choice = native_choice("auto", device, dtype, deterministic=False)
    cache = cache_bytes(device) or ASSUMED
    weights = several("dense", n, k, device, dtype, cache_bytes=cache, choice=choice)
    x = torch.randn(m, k, device=device).to(dtype)
    return then / product_time(weights, x, None if choice is None else choice.native)
