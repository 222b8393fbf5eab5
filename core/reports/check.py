"""The report of `infopt bench check`."""

from typing import Literal

from infopt.core.reports.schema import Record, Report


class CheckedLimit(Record):
    """One figure and its limit, in the figure's unit."""

    key: str
    value: float | None
    """None where it is infinite: so many requests failed."""
    kind: Literal["max", "min"]
    limit: float
    margin: float | None
    """Share of the limit that is left; below zero, the share by which it is missed."""
    holds: bool
    baseline: float | None = None
    """The stored run's figure, where the limit follows from it."""


class CheckReport(Report):
    command: str = "check"
    file: str
    baseline: str | None = None
    limits: tuple[CheckedLimit, ...]
    passed: bool
