"""Keeping reports: JSON with stable keys, and a page for people."""

from pathlib import Path

from infopt.core.files import write_atomically
from infopt.core.reports.schema import Record, Report


def to_json(report: Record) -> str:
    """The report as JSON text; numbers that are not finite become null."""
    return report.model_dump_json(indent=1)


def save(report: Record, path: Path) -> None:
    """Write the report to a file, whole or not at all."""
    write_atomically(path, to_json(report) + "\n")


def save_html(report: Report, path: Path) -> None:
    """Write the report's page to a file, whole or not at all."""
    from infopt.core.reports.html import to_html  # its templates are slow to import

    write_atomically(path, to_html(report))
