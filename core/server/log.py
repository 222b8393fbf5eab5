"""A line of JSON for each request and each event of the server's life; no content, no keys."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from infopt.core.errors import ResourceError
from infopt.core.server.visit import Visit

QUIET = frozenset({"/health", "/ready", "/metrics"})
"""What probes ask every few seconds is told of only where it failed."""


def is_told(visit: Visit) -> bool:
    """Whether logs and traces tell of a visit that is over."""
    return visit.path not in QUIET or visit.outcome >= 500


class RequestLog:
    """Lines into a file; without one, nothing."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream

    @classmethod
    def open(cls, path: str | None) -> "RequestLog":
        """Append to a file; `-` is the standard error. Raises ResourceError."""
        if path is None:
            return cls()
        try:
            place = Path("/dev/stderr") if path == "-" else Path(path).expanduser()
            return cls(place.open("a", buffering=1, encoding="utf-8"))
        except OSError as error:
            raise ResourceError(f"cannot write a log to {path}: {error.strerror}") from error

    def visit(self, visit: Visit) -> None:
        """One request, when it is over."""
        if not is_told(visit):
            return
        self._write(
            "request",
            request_id=visit.id,
            client=visit.client,
            method=visit.method,
            path=visit.path,
            status=visit.outcome,
            seconds=round(visit.age, 6),
            ttft_s=None if visit.ttft is None else round(visit.ttft, 6),
            prompt_tokens=visit.prompt_tokens,
            cached_tokens=visit.cached_tokens,
            output_tokens=visit.output_tokens,
            finish_reasons=visit.finish_reasons,
            error=visit.fault,
        )

    def event(self, name: str, note: str) -> None:
        """Something that happened to the server."""
        self._write(name, note=note)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, event: str, **values: Any) -> None:
        if self._stream is None:
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values}
        with suppress(OSError):  # a full disk ends no request
            self._stream.write(json.dumps(line, ensure_ascii=True) + "\n")
