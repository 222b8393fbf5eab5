"""The report of `infopt serve --ask`, and of a serve step in a run."""

from infopt.core.reports.schema import Record, Report


class Answer(Record):
    question: str
    answer: str
    seconds: float
    completion_tokens: int


class ServeReport(Report):
    command: str = "serve"
    url: str
    startup_s: float
    """From starting the process until it was ready."""
    answers: tuple[Answer, ...]
