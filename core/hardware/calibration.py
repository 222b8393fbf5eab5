"""The stored measurement of a device: what it really reaches, under which conditions."""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infopt.core.files import cache_directory, write_atomically


class Calibration(BaseModel):
    """The measured peaks of one device, dtype and thread count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    device: str
    """The processor's or GPU's name."""
    dtype: str
    threads: int = Field(ge=1)
    flops_per_s: float = Field(gt=0, allow_inf_nan=False)
    """Of the best matrix product."""
    bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    """Of the best reading kernel."""
    measured_at: str
    """UTC, ISO 8601."""
    conditions: dict[str, str] = {}
    """In words: torch's version, load at the time, the winning kernels and sizes."""


def calibration_file(device: str, dtype: str, threads: int, *, cache: Path | None = None) -> Path:
    """Where the record of this device, dtype and thread count lies."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()[:60]
    # Two names may be plain alike; the digest tells them apart.
    digest = hashlib.sha256(device.encode()).hexdigest()[:8]
    folder = (cache or cache_directory()) / "calibration"
    return folder / f"{plain}-{digest}-{dtype}-{threads}t.json"


def store_calibration(record: Calibration, *, cache: Path | None = None) -> Path:
    """Write a record in its place, whole or not at all; raises ResourceError for a full disk."""
    file = calibration_file(record.device, record.dtype, record.threads, cache=cache)
    write_atomically(file, json.dumps(record.model_dump(), indent=2) + "\n")
    return file


def load_calibration(
    device: str, dtype: str, threads: int, *, cache: Path | None = None
) -> tuple[Calibration | None, str | None]:
    """The stored record, or None; and a warning where a file is there but cannot be used."""
    file = calibration_file(device, dtype, threads, cache=cache)
    try:
        record = Calibration.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"the stored calibration {file} cannot be read: {error.strerror}"
    except (ValidationError, ValueError):
        return None, f"the stored calibration {file} is damaged and is not used"
    if (record.device, record.dtype, record.threads) != (device, dtype, threads):
        return None, f"the stored calibration {file} is of another device and is not used"
    return record, None
