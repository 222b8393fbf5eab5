import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from infopt.core.errors import EngineError, UsageError
from infopt.core.server.faults import ApiError, api_error
from infopt.core.server.respond import ClientGone, EventStream, while_connected


class Connection:
    """One ASGI exchange: what was sent, and a client that leaves when told."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def respond(events: AsyncGenerator[dict[str, Any], None]) -> Connection:
    async def run() -> Connection:
        connection = Connection()
        await EventStream(events)({"type": "http"}, connection.receive, connection.send)
        return connection

    return asyncio.run(run())


async def events(*items: Any) -> AsyncGenerator[dict[str, Any], None]:
    for item in items:
        await asyncio.sleep(0)
        if isinstance(item, Exception):
            raise item
        yield item


def test_events_and_done() -> None:
    connection = respond(events({"a": "ä"}, {"b": 1}))
    assert connection.sent[0]["status"] == 200
    assert connection.body == 'data: {"a": "ä"}\n\ndata: {"b": 1}\n\ndata: [DONE]\n\n'.encode()
    assert connection.sent[-1]["more_body"] is False


def test_a_fault_before_the_first_event_has_its_own_status() -> None:
    connection = respond(events(UsageError("too long")))
    assert connection.sent[0]["status"] == 400
    assert json.loads(connection.body)["error"]["message"] == "too long"


def test_a_fault_in_mid_stream_is_an_event() -> None:
    connection = respond(events({"a": 1}, EngineError("lost")))
    assert connection.sent[0]["status"] == 200 and connection.sent[-1]["more_body"] is False
    error = json.loads(connection.body.split(b"data: ")[-1])["error"]
    assert error["message"] == "lost" and error["type"] == "engine_error"
    assert b"[DONE]" not in connection.body


def test_a_bug_in_mid_stream_is_told_and_raised() -> None:
    with pytest.raises(KeyError):
        respond(events({"a": 1}, KeyError("secret")))


def test_a_client_that_leaves_closes_the_generator() -> None:
    closed: list[str] = []

    async def endless() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"n": 0}
            await asyncio.sleep(60)
        finally:
            closed.append("yes")

    async def run() -> None:
        connection = Connection()
        asyncio.get_running_loop().call_later(0.05, connection.left.set)
        await EventStream(endless())({"type": "http"}, connection.receive, connection.send)

    asyncio.run(run())
    assert closed == ["yes"]


def test_work_that_nobody_waits_for_is_ended_before_it_is_told() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("yes")

    async def run() -> None:
        connection = Connection()
        connection.left.set()
        with pytest.raises(ClientGone):
            await while_connected(work(), connection.receive)
        assert ended == ["yes"]

    asyncio.run(run())


def test_errors_as_the_api_tells_them() -> None:
    assert api_error(UsageError("x")).status == 400
    assert api_error(EngineError("x")).status == 503
    own = ApiError(404, "x")
    assert api_error(own) is own
    hidden = api_error(KeyError("secret"))
    assert hidden.status == 500 and "secret" not in str(hidden.body)
