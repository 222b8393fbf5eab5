"""The API's end of the engine: many requests over one socket, each with its own queue."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from infopt.core.errors import EngineError, InfoptError, RequestFailedError, UsageError
from infopt.core.runtime.request import Joined, SamplingParams, StepOutput
from infopt.core.server import messages

Event = StepOutput | Joined | Exception


class EngineClient:
    """Requests in, tokens out; `run` must be running for anything to come back."""

    def __init__(self, channel: zmq.asyncio.Socket) -> None:
        self.limits: asyncio.Future[messages.Limits] = asyncio.get_running_loop().create_future()
        """Known once the engine is loaded; raises what kept it from loading."""
        self.failure: InfoptError | None = None
        self._channel = channel
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._asking: list[asyncio.Future[dict[str, Any]]] = []

    async def run(self) -> None:
        """Hand what the engine sends to whom it concerns, until cancelled."""
        while True:
            message = messages.unpack(await self._channel.recv())
            match message["kind"]:
                case "outputs":
                    for values in message["outputs"]:
                        output = messages.output_from_map(values)
                        self._tell(output.request_id, output)
                    for values in message["joined"]:
                        joined = messages.joined_from_map(values)
                        self._tell(joined.request_id, joined)
                case "rejected":
                    self._tell(message["id"], messages.error_from_map(message))
                case "stats":
                    for future in self._asking:
                        if not future.done():
                            future.set_result(message["stats"])
                    self._asking.clear()
                case "ready":
                    found = messages.Limits(message["max_model_len"], message["cache_tokens"])
                    self.limits.set_result(found)
                case "failed":
                    self.fail(messages.error_from_map(message))

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        ended: Collection[int] = (),
        *,
        on_join: Callable[[Joined], None] | None = None,
        until: "asyncio.Future[Exception] | None" = None,
    ) -> AsyncGenerator[StepOutput, None]:
        """The outputs of one request; closing the generator early aborts it in the engine.

        Answers that the caller has put into `ended` since the last output are aborted alone.
        `on_join` hears when the request waits no longer; what comes of `until` ends it, raised
        here. Raises UsageError if the engine rejects the request, EngineError if it fails or is
        gone.
        """
        self._check()
        name = uuid.uuid4().hex
        queue = self._queues[name] = asyncio.Queue()
        going = set(range(params.n))
        try:
            await self._send("add", id=name, prompt=prompt, params=messages.params_to_map(params))
            if until is not None:
                until.add_done_callback(lambda over: queue.put_nowait(over.result()))
            while going:
                event = await queue.get()
                if isinstance(event, Joined):
                    if on_join is not None:
                        on_join(event)
                    continue
                if isinstance(event, Exception):
                    raise event
                if event.index not in going:
                    continue
                if event.finish_reason is not None:
                    going.remove(event.index)
                if event.finish_reason in ("error", "abort"):
                    raise _failure(event)
                yield event
                for index in going.intersection(ended):
                    going.remove(index)
                    await self._send("abort", id=name, index=index)
        finally:
            del self._queues[name]
            if going and self.failure is None:
                await self._send("abort", id=name, index=None)

    async def stats(self, timeout: float) -> dict[str, Any]:
        """Ask the engine for its counts; EngineError if it is gone or silent for too long."""
        self._check()
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asking.append(future)
        await self._send("stats")
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise EngineError(f"the engine did not answer within {timeout:g} s") from None

    async def stop(self) -> None:
        """Let the engine end in order; its process says when it has."""
        await self._send("stop")

    def fail(self, error: InfoptError) -> None:
        """Give every request in flight this error, and all later ones; the first error stays."""
        if self.failure is not None:
            return
        self.failure = error
        if not self.limits.done():
            self.limits.set_exception(error)
        for queue in self._queues.values():
            queue.put_nowait(self._fresh())
        for future in self._asking:
            if not future.done():
                future.set_exception(self._fresh())
        self._asking.clear()

    def _fresh(self) -> InfoptError:
        """An exception of its own for each raiser: tracebacks pile up on a shared one."""
        assert self.failure is not None
        return EngineError(self.failure.message, self.failure.hint)

    def _check(self) -> None:
        if self.failure is not None:
            raise self._fresh()

    async def _send(self, kind: str, **content: object) -> None:
        # Without waiting: an engine that is gone takes nothing, and its end is told by `fail`.
        with suppress(zmq.Again):
            await self._channel.send(messages.pack(kind, **content), zmq.NOBLOCK)

    def _tell(self, name: str, event: Event) -> None:
        queue = self._queues.get(name)
        if queue is not None:
            queue.put_nowait(event)


def _failure(output: StepOutput) -> Exception:
    reason = output.error or "it was aborted"
    if output.refused:
        return UsageError(f"the request cannot be answered: {reason}")
    return RequestFailedError(f"the request failed: {reason}")
