"""Where the numbers of a report come from, by their keys."""

from infopt.core.reports.schema import Origin, Report


def origin(report: Report, key: str) -> Origin | None:
    """Where the number at a dotted path comes from: its own entry, else that of a prefix."""
    while key:
        found = report.provenance.get(key)
        if found is not None:
            return found
        key = key.rpartition(".")[0]
    return None
