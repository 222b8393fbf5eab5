"""The way in and out of every HTTP request: who it is, whether it may come in, and its log.

Pure ASGI: a middleware that hides the client's disconnect would let work run on for nobody.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infopt.core.server.admission import Gate
from infopt.core.server.faults import ApiError, error_response, shutting_down
from infopt.core.server.keys import Keys
from infopt.core.server.log import RequestLog
from infopt.core.server.metrics import Metrics
from infopt.core.server.visit import Visit

BODY_SECONDS = 60.0
"""A client that sends its body more slowly is not waited for."""
OPEN = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/favicon.ico"})
"""Paths that need no key."""
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TIMEOUT = "x-request-timeout"
_TRACE = ("traceparent", "tracestate")


class Tracing(Protocol):
    """Where visits are told of when they are over."""

    def visit(self, visit: Visit) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class House:
    """What all visits share; what a reload may change is replaced here."""

    gate: Gate
    metrics: Metrics
    log: RequestLog
    tracing: Tracing | None = None
    keys: Keys | None = None
    max_body_bytes: int = 16 * 2**20
    request_timeout: float = 600.0
    draining: bool = False
    visits: set[Visit] = field(default_factory=set)
    """Those that are inside."""
    last_left: float = field(default_factory=time.monotonic)
    """When the last one with work for the engine left."""

    @property
    def working(self) -> int:
        """Visits that wait for the engine or are answered by it."""
        return sum(visit.working for visit in self.visits)


class Doorway:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, house: House, paths: frozenset[str]) -> None:
        """`paths`: those of the routes; metrics must not grow with what clients make up."""
        self._app, self._house, self._paths = app, house, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        trace = {name: headers[name] for name in _TRACE if name in headers}
        visit = Visit(_id(headers), scope["method"], scope["path"], trace=trace)
        scope.setdefault("state", {})["visit"] = visit
        house = self._house
        house.visits.add(visit)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                named = (b"x-request-id", visit.id.encode())
                message = {**message, "headers": [*message.get("headers", ()), named]}
            await send(message)

        try:
            try:
                self._admit(visit, headers)
            except ApiError as error:
                visit.fault = error.code
                house.metrics.rejected(error.code)
                await error_response(error)(scope, receive, told)
                return
            await self._app(scope, _Bounded(receive, house.max_body_bytes), told)
        finally:
            visit.close()
            house.visits.discard(visit)
            if visit.working:
                house.last_left = time.monotonic()
            path = visit.path if visit.path in self._paths else "other"
            house.metrics.responded(path, visit.outcome, visit.client)
            house.log.visit(visit)
            if house.tracing is not None:
                house.tracing.visit(visit)

    def _admit(self, visit: Visit, headers: Headers) -> None:
        """Raise ApiError for who may not come in; begin what has to end with the visit."""
        house = self._house
        if visit.path in OPEN:
            return
        if house.keys is not None:
            visit.key = house.keys.find(_bearer(headers))
            if visit.key is None:
                raise _UNKNOWN.fresh()
        if visit.method != "POST":
            return
        if house.draining:
            raise shutting_down()
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > house.max_body_bytes:
            raise ApiError(413, _too_large(house.max_body_bytes), code="body_too_large")
        visit.end_after(min(_timeout(headers), house.request_timeout))
        rate, most = (None, None) if visit.key is None else (visit.key.rate, visit.key.concurrency)
        visit.on_close(house.gate.enter(visit.client, rate=rate, concurrency=most))
        visit.working = True


class _Bounded:
    """A body up to a size, sent in time; what comes after it, a disconnect, is waited for."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self._size, self._whole = 0, False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), BODY_SECONDS)
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} s") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                raise HTTPException(413, _too_large(self._limit))
        return message


_UNKNOWN = ApiError(
    401,
    "there is no such API key: send a right one as 'Authorization: Bearer KEY'",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, word = headers.get("authorization", "").partition(" ")
    return word.strip() if scheme.lower() == "bearer" else ""


def _timeout(headers: Mapping[str, str]) -> float:
    """The seconds that the client will wait, as it says."""
    said = headers.get(_TIMEOUT)
    if said is None:
        return float("inf")
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ApiError(400, f"{_TIMEOUT} is a number of seconds above 0", code="invalid_header")
    return seconds


def _id(headers: Mapping[str, str]) -> str:
    """The client's name for the request, where it is one that a log can hold."""
    said = headers.get("x-request-id", "")
    return said if _ID.fullmatch(said) else uuid.uuid4().hex


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes"
