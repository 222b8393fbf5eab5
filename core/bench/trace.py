"""A trace to replay: when requests came, and how long they were."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.core.errors import UsageError

_FORM = 'one JSON object a line: {"timestamp": 1500, "input_length": 900, "output_length": 52}'


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    time: float
    """Seconds from the first."""
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, *, speedup: float = 1.0) -> list[TraceRow]:
    """Read Mooncake's JSON lines (timestamps in ms), in the order of time.

    Raises UsageError naming the file and the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the trace {path} cannot be read: {error}") from None
    rows = [_row(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"the trace {path} holds no request", _FORM)
    rows.sort(key=lambda row: row.time)
    start = rows[0].time
    return [
        TraceRow((row.time - start) / 1000 / speedup, row.prompt_tokens, row.output_tokens)
        for row in rows
    ]


def _row(path: Path, number: int, line: str) -> TraceRow:
    try:
        found = json.loads(line)
    except ValueError:
        raise UsageError(f"{path}, line {number} is not JSON", _FORM) from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}, line {number} is no object", _FORM)
    time = found.get("timestamp")
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < 1e15:
        raise UsageError(f"{path}, line {number}: timestamp is {time!r}, not milliseconds", _FORM)
    return TraceRow(
        float(time),
        _length(path, number, found, "input_length"),
        _length(path, number, found, "output_length"),
    )


def _length(path: Path, number: int, found: dict[str, Any], key: str) -> int:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(
            f"{path}, line {number}: {key} is {value!r}, not a number of tokens", _FORM
        )
    return value
