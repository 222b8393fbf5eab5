"""The report of `infopt run`: the reports of its steps, in their order."""

from pydantic import SerializeAsAny

from infopt.core.reports.schema import Record, Report


class StepReport(Record):
    verb: str
    model: str
    """The path of the artifact that the step read."""
    output: str | None
    """The path of the artifact that it wrote."""
    report: SerializeAsAny[Report]


class RunReport(Report):
    command: str = "run"
    recipe: str
    steps: tuple[StepReport, ...]
    seconds: float
