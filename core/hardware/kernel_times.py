"""How long this device's kernels took, shape by shape: from which times are predicted."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infopt.core.files import write_atomically
from infopt.core.hardware.calibration import calibration_file


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProductTime(_Part):
    """x [m, k] by a weight [n, k] that is not in the cache."""

    format: str
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    seconds: float = Field(gt=0, allow_inf_nan=False)


class LayerTime(_Part):
    """A layer without its products: attention over the cache, norms, rotation, activation."""

    batch: int = Field(ge=1)
    new: int = Field(ge=1)
    """Tokens of each sequence that are computed."""
    context: int = Field(ge=1)
    """Tokens that the last of them attends to, itself included."""
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    seconds: float = Field(gt=0, allow_inf_nan=False)


class StepTime(_Part):
    """An engine's decode step beyond its layers and products: scheduling, sampling."""

    batch: int = Field(ge=1)
    vocab_size: int
    seconds: float = Field(gt=0, allow_inf_nan=False)


class KernelTimes(_Part):
    """One device, dtype and number of threads."""

    schema_version: Literal[1] = 1
    device: str
    dtype: str
    threads: int = Field(ge=1)
    measured_at: str
    products: tuple[ProductTime, ...]
    layers: tuple[LayerTime, ...]
    steps: tuple[StepTime, ...] = ()
    conditions: Mapping[str, str] = {}


def kernel_times_file(device: str, dtype: str, threads: int, *, cache: Path | None = None) -> Path:
    """Beside the peaks of the same device, dtype and threads."""
    peaks = calibration_file(device, dtype, threads, cache=cache)
    return peaks.with_name(f"{peaks.stem}-kernels.json")


def store_kernel_times(record: KernelTimes, *, cache: Path | None = None) -> Path:
    """Write a record in its place, whole or not at all; raises ResourceError for a full disk."""
    file = kernel_times_file(record.device, record.dtype, record.threads, cache=cache)
    write_atomically(file, record.model_dump_json(indent=1) + "\n")
    return file


def load_kernel_times(
    device: str, dtype: str, threads: int, *, cache: Path | None = None
) -> KernelTimes | None:
    """The stored record; None where there is none that can be read."""
    file = kernel_times_file(device, dtype, threads, cache=cache)
    try:
        record = KernelTimes.model_validate_json(file.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None
    same = (record.device, record.dtype, record.threads) == (device, dtype, threads)
    return record if same else None


def product_seconds(times: Sequence[ProductTime], m: int, n: int, k: int) -> float | None:
    """Of a product, between those measured in its format; None where none was.

    Interpolated in the logarithms of rows and of weights, among weights that are wide or not, as
    this one is; beyond the grid in proportion.
    """
    alike = [one for one in times if (one.n > one.k) == (n > k)] or list(times)
    sizes = sorted({one.n * one.k for one in alike})
    if not sizes:
        return None
    by_size = []
    for size in sizes:
        found = sorted((one.m, one.seconds) for one in alike if one.n * one.k == size)
        by_size.append((size, _between(found, m)))
    return _between(by_size, n * k)


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    """On the line through the two nearest points in logarithms; from the ends in proportion."""
    places = [place for place, _ in points]
    index = bisect_left(places, at)
    if index == len(points):
        return points[-1][1] * at / places[-1]
    if places[index] == at or index == 0:
        return points[index][1] if places[index] == at else _below(points, at)
    (left, low), (right, high) = points[index - 1], points[index]
    share = math.log(at / left) / math.log(right / left)
    return math.exp(math.log(low) * (1 - share) + math.log(high) * share)


def _below(points: Sequence[tuple[int, float]], at: int) -> float:
    """Under the smallest a call's own cost counts for more than the work: half of it stays."""
    place, seconds = points[0]
    return seconds * (0.5 + 0.5 * at / place)
