"""A scripted server of raw bytes, so that every cut between reads is the test's own."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

Script = list[float | bytes]
"""What the server does with a completion: wait for seconds, or write bytes."""


@dataclass
class MockServer:
    """Answers completions by `script(body)`; a script of a status and a body is an error."""

    script: Callable[[dict[str, Any]], Script | tuple[int, bytes]]
    model: dict[str, Any] = field(default_factory=lambda: {"id": "mock", "vocab_size": 1000})
    metrics: Callable[[], str] | None = None
    """What /metrics says; None: there is none."""
    before: Callable[[dict[str, Any]], Awaitable[None]] | None = None
    """What a completion waits for first."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    """The request line and headers of each completion."""
    in_flight: int = 0
    most_in_flight: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /metrics"):
                text = None if self.metrics is None else self.metrics()
                writer.write(_response(404 if text is None else 200, "text/plain"))
                writer.write((text or "").encode())
            elif head.startswith(b"GET"):
                listed = json.dumps({"data": [self.model]}).encode()
                writer.write(_response(200, "application/json") + listed)
            else:
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                self.heads.append(head.decode())
                await self._complete(json.loads(await reader.readexactly(length)), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.before is not None:
                await self.before(body)
            script = self.script(body)
            if isinstance(script, tuple):
                writer.write(_response(script[0], "application/json") + script[1])
                return
            writer.write(_response(200, "text/event-stream"))
            for act in script:
                if isinstance(act, float):
                    await asyncio.sleep(act)
                else:
                    writer.write(act)
                    await writer.drain()
        finally:
            self.in_flight -= 1


def _response(status: int, kind: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode()


class Mocks:
    """Starts scripted servers in the loop of a thread, and writes frames for their scripts."""

    DONE = b"data: [DONE]\n\n"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._servers: list[asyncio.Server] = []

    def __call__(self, script: Callable[[dict[str, Any]], Any], **model: Any) -> MockServer:
        mock = MockServer(script)
        mock.model.update(model)

        async def listen() -> asyncio.Server:
            return await asyncio.start_server(mock.handle, "127.0.0.1", 0)

        server = asyncio.run_coroutine_threadsafe(listen(), self._loop).result()
        self._servers.append(server)
        mock.port = server.sockets[0].getsockname()[1]
        return mock

    @staticmethod
    def frame(text: str | None, *, finish: str | None = None, **more: Any) -> bytes:
        """One event of a stream; `text` None: no choices."""
        choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": finish}]
        return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"

    @staticmethod
    def delta(*, finish: str | None = None, **delta: Any) -> bytes:
        """One event of a chat's stream."""
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        return b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n"

    @staticmethod
    def usage(completion: int, prompt: int = 4) -> dict[str, int]:
        return {"prompt_tokens": prompt, "completion_tokens": completion}

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def mock() -> Iterator[Mocks]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    mocks = Mocks(loop)
    yield mocks
    asyncio.run_coroutine_threadsafe(mocks.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
