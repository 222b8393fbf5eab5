"""Keeping reports: JSON with stable keys."""

from pathlib import Path

from infopt.core.files import write_atomically
from infopt.core.reports.schema import Record


def to_json(report: Record) -> str:
    """The report as JSON text; numbers that are not finite become null."""
    return report.model_dump_json(indent=1)


def save(report: Record, path: Path) -> None:
    """Write the report to a file, whole or not at all."""
    write_atomically(path, to_json(report) + "\n")
