"""From the chunks of an answer to its record: pure arithmetic, no clock."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from infopt.core.bench.client import Chunk
from infopt.core.reports.requests import RequestRecord


@dataclass(slots=True)
class Trip:
    """One request on its way; times are `perf_counter` seconds."""

    index: int
    level: int
    scheduled: float
    released: float
    sent: float
    asked_tokens: int
    ended: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)
    error: str | None = None


def record(trip: Trip, *, counted_by: str, origin: float = 0.0) -> RequestRecord:
    """What is kept of a request; `origin` is the clock at the run's start.

    An answer without any token is a failure. The tokens are those that the target counted, unless
    it counted fewer than the chunks that came: each of them held one at least.
    """
    contents = [chunk for chunk in trip.chunks if chunk.content]
    error = trip.error
    if error is None and not contents:
        error = "the answer held no text"
    prompt = [c.prompt_tokens for c in trip.chunks if c.prompt_tokens is not None]
    tokens = _tokens(trip.chunks, len(contents))
    spread = _spread(contents, tokens)
    answers = [chunk.time for chunk in contents if chunk.answer]
    return RequestRecord(
        index=trip.index,
        level=trip.level,
        scheduled=trip.scheduled - origin,
        released=trip.released - origin,
        sent=trip.sent - origin,
        first=contents[0].time - origin if contents else None,
        first_output=answers[0] - origin if answers else None,
        last=spread.arrivals[-1][0] - origin if contents else None,
        ended=trip.ended - origin,
        prompt_tokens=prompt[-1] if prompt else None,
        output_tokens=tokens.count,
        tokens_at_first=spread.arrivals[0][1] if contents else 0,
        guessed=spread.guessed,
        asked_tokens=trip.asked_tokens,
        count_source=counted_by if tokens.counted else "chunks",
        arrivals=tuple((time - origin, float(n)) for time, n in spread.arrivals),
        error=error,
    )


@dataclass(frozen=True, slots=True)
class _Tokens:
    count: int
    counted: bool
    """The target said so; else each chunk with content counts as one."""


@dataclass(frozen=True, slots=True)
class _Spread:
    """Which tokens came when."""

    arrivals: list[tuple[float, int]]
    guessed: bool


def _tokens(chunks: Sequence[Chunk], contents: int) -> _Tokens:
    said = [c.completion_tokens for c in chunks if c.completion_tokens is not None]
    if contents and said and said[-1] >= contents:
        return _Tokens(said[-1], True)
    return _Tokens(contents, False)


def _spread(contents: Sequence[Chunk], tokens: _Tokens) -> _Spread:
    """The tokens of each read, by its time."""
    totals = _running_totals(contents, tokens.count)
    if totals is not None:
        each = [later - earlier for earlier, later in pairwise([0, *totals])]
        return _Spread(_merged(contents, each), False)
    times = list(dict.fromkeys(chunk.time for chunk in contents))
    reads = Counter(chunk.time for chunk in contents)
    if len(times) == 1:
        return _Spread([(times[0], tokens.count)], False)
    # Nobody says what the first read held: a token a chunk, as if its rest had come after.
    first = reads[times[0]]
    rest, left = len(contents) - first, tokens.count - first
    spread, seen, given = [(times[0], first)], 0, 0
    for time in times[1:]:
        seen += reads[time]
        upto = round(left * seen / rest)
        spread.append((time, upto - given))
        given = upto
    return _Spread(spread, True)


def _merged(contents: Sequence[Chunk], each: Sequence[int]) -> list[tuple[float, int]]:
    """Chunks of one read are one arrival; text that was only held back brings no token."""
    found: dict[float, int] = {}
    for chunk, count in zip(contents, each, strict=True):
        found[chunk.time] = found.get(chunk.time, 0) + count
    return [(time, count) for time, count in found.items() if count]


def _running_totals(contents: Sequence[Chunk], tokens: int) -> list[int] | None:
    """Tokens up to and with each chunk; None where chunks held several and none said how many."""
    if tokens == len(contents):
        return list(range(1, tokens + 1))
    said = [chunk.completion_tokens for chunk in contents]
    totals = [count for count in said if count is not None]
    if len(totals) < len(said) or not totals or totals[0] < 1 or totals[-1] > tokens:
        return None
    if any(later < earlier for earlier, later in pairwise(totals)):
        return None
    if totals[-1] < tokens:  # the last count came late: what it adds belongs to the last chunk
        totals[-1] = tokens
    return totals
