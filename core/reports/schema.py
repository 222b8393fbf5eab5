"""The one schema of all reports: what was found, and how it was made."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Origin = Literal["measured", "calibrated", "computed", "datasheet", "assumed"]
"""Where a number comes from: timed or counted on this device just now; measured earlier and stored;
derived by arithmetic from configs and files; a vendor's figure; or a guess, said to be one."""


class Record(BaseModel):
    """A frozen part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Environment(Record):
    """The machine and the software that made the numbers."""

    infopt: str
    python: str
    platform: str
    device: str
    """The device computed on, by its name."""
    cpu: str
    threads: int
    memory_bytes: int
    packages: dict[str, str]


class Making(Record):
    """How a report came about, enough to repeat it."""

    argv: tuple[str, ...]
    settings: dict[str, Any]
    seed: int | None
    created: str
    """UTC, ISO 8601."""
    seconds: float
    environment: Environment


class ModelSummary(Record):
    """The artifact that a report speaks of."""

    name: str
    path: str
    architecture: str
    parameters: int
    bytes: int
    """Bytes of the weight files."""
    quantization: str | None = None
    """Such as 'gptq 4-bit g64 sym'."""


class Percentiles(Record):
    """Of a sample; in the unit of the field's name."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float


class Report(Record):
    """The head of every report; each verb's report adds its findings at the top level."""

    schema_version: Literal[1] = 1
    command: str
    model: ModelSummary | None = None
    provenance: dict[str, Origin]
    """The origin of each number by its key's dotted path; a prefix speaks for all below it."""
    warnings: tuple[str, ...] = ()
    made: Making | None = None


class Plan(Record):
    """What a command would do (`--dry-run`)."""

    command: str
    actions: tuple[str, ...]
    memory_bytes: int
    """Peak resident memory expected."""
    disk_bytes: int = 0
    seconds: float | None = None
    """Expected time; None where nothing is known to predict it from."""
