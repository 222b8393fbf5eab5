"""One line a request: what a bench saw of each, from which every figure can be computed again."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from infopt.core.errors import UsageError
from infopt.core.files import write_atomically
from infopt.core.reports.schema import Record


class RequestRecord(Record):
    """One request of a load; times are seconds from the run's start, by a monotonic clock."""

    index: int
    """Its place in the load's order."""
    level: int = 0
    """Which level of a sweep it belongs to; 0 where there is one."""
    scheduled: float
    """When it was due; in a closed loop, when it was sent."""
    released: float | None = None
    """When it was free to go: due, and with a place under our own bound on those in flight. From
    here to `sent` it waited for nothing but this client."""
    sent: float
    first: float | None = None
    """When its first token of any kind was read: reasoning, tool call or text."""
    first_output: float | None = None
    """When its first token of the answer itself was read (TTFOT)."""
    last: float | None = None
    """When its last token was read."""
    ended: float
    """When the stream closed, or the request failed."""
    prompt_tokens: int | None = None
    output_tokens: int = 0
    tokens_at_first: int = 0
    """Tokens that came with the first read; TPOT counts those after it."""
    guessed: bool = False
    """Reads brought several tokens and nobody said how many each: the first is taken for one, the
    rest are spread evenly."""
    asked_tokens: int | None = None
    """The output's length that was asked for."""
    count_source: str = "usage"
    """Who counted the output's tokens: 'usage', 'engine', 'retokenized' or 'chunks'."""
    arrivals: tuple[tuple[float, float], ...] = ()
    """(time, tokens) of each read that brought tokens."""
    error: str | None = None
    """Why it failed; None if it completed."""

    @property
    def completed(self) -> bool:
        return self.error is None

    @property
    def ttft(self) -> float | None:
        """Seconds from when it was due to its first token; None where none came."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def ttfot(self) -> float | None:
        """Seconds from when it was due to the first token of the answer itself."""
        return None if self.first_output is None else self.first_output - self.scheduled

    @property
    def e2e(self) -> float | None:
        """Seconds from when it was due to its last token."""
        return None if self.last is None else self.last - self.scheduled

    @property
    def lag(self) -> float:
        """Seconds that it was sent late."""
        return self.sent - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first read; None, never 0, where no token came after it."""
        rest = self.output_tokens - self.tokens_at_first
        if self.first is None or self.last is None or rest <= 0 or self.last <= self.first:
            return None
        return (self.last - self.first) / rest


def write_requests(path: Path, records: Iterable[RequestRecord]) -> None:
    """Write JSON lines, whole or not at all."""
    write_atomically(path, "".join(record.model_dump_json() + "\n" for record in records))


def read_requests(path: Path) -> Iterator[RequestRecord]:
    """The records of a file of JSON lines; raises UsageError naming the line that is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield RequestRecord.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "the line"
            raise UsageError(
                f"{path}, line {number}: {where}: {fault['msg']}",
                "give the requests.jsonl that a bench wrote",
            ) from None
