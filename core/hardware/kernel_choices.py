"""Which of several kernels was the fastest on this device, shape by shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from infopt.core.files import write_atomically
from infopt.core.hardware.calibration import calibration_file


class KernelChoices(BaseModel):
    """Of one device, dtype and number of threads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    device: str
    dtype: str
    threads: int
    versions: str
    """Of the libraries that were compared: what was measured of others says nothing."""
    chosen: Mapping[str, str] = {}
    """By format and shape, such as 'dense 576x1536': 'native' or 'torch'."""


def choices_file(device: str, dtype: str, threads: int, *, cache: Path | None = None) -> Path:
    """Beside the peaks of the same device, dtype and threads."""
    peaks = calibration_file(device, dtype, threads, cache=cache)
    return peaks.with_name(f"{peaks.stem}-choices.json")


def load_choices(
    device: str, dtype: str, threads: int, versions: str, *, cache: Path | None = None
) -> KernelChoices:
    """The stored choices; none where there are none that hold."""
    empty = KernelChoices(device=device, dtype=dtype, threads=threads, versions=versions)
    try:
        text = choices_file(device, dtype, threads, cache=cache).read_bytes()
        found = KernelChoices.model_validate_json(text)
    except (OSError, ValidationError, ValueError):
        return empty
    return found if found.model_copy(update={"chosen": {}}) == empty else empty


def store_choices(record: KernelChoices, *, cache: Path | None = None) -> Path:
    """Write a record in its place, whole or not at all; raises ResourceError for a full disk."""
    file = choices_file(record.device, record.dtype, record.threads, cache=cache)
    write_atomically(file, record.model_dump_json(indent=1) + "\n")
    return file
