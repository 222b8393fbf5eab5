"""The report of `infopt doctor`."""

from infopt.core.reports.schema import Record, Report


class Finding(Record):
    """One thing looked at, and what to do if it does not serve."""

    name: str
    usable: bool
    detail: str
    advice: str | None = None


class DefaultModel(Record):
    """The embedded default model."""

    path: str | None
    """Its directory, ready for use; None where it could not be made ready."""
    name: str
    error: str | None = None


class DoctorReport(Report):
    command: str = "doctor"
    default_model: DefaultModel
    cache: str
    device: str
    dtype: str
    findings: tuple[Finding, ...]
