"""Answers that end when the client goes away: pure ASGI, streamed or whole."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infopt.core.errors import InfoptError
from infopt.core.server.faults import ApiError, api_error, error_response

T = TypeVar("T")


class ClientGone(Exception):
    """There is nobody left to answer."""


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Race the work against the client's disconnect; raises ClientGone once the work has ended.

    `receive` must have handed out the whole body already.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from a generator, which is closed when the client goes away.

    A fault before the first event is an answer with its own status; a later one is an event.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await while_connected(self._send(scope, receive, send), receive)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events):
                async for event in self._events:
                    if not started:
                        started = True
                        await send(_start(self.raw_headers))
                    await send(_body(_event(event)))
            await send(_body(b"data: [DONE]\n\n", last=True))
        except Exception as error:
            if (visit := scope.get("state", {}).get("visit")) is not None:
                visit.fault = api_error(error).code
            if started:
                await send(_body(_event(api_error(error).body), last=True))
            else:
                await error_response(error)(scope, receive, send)
            if not isinstance(error, ApiError | InfoptError):
                raise


def _start(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _body(content: bytes, *, last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": not last}
