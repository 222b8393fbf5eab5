"""Load against the engine itself, stepped in a thread of this process: no HTTP, no tokenizer."""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, Self

from infopt.core.bench.client import Chunk, Request
from infopt.core.errors import EngineError, InfoptError
from infopt.core.runtime.request import SamplingParams, StepOutput


class SteppedEngine(Protocol):
    """What this client needs of an engine."""

    max_model_len: int

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[StepOutput]: ...

    def has_work(self) -> bool: ...


Event = Chunk | InfoptError | None
"""A chunk of the answer, its failure, or its end."""


@dataclass(slots=True)
class _Flight:
    """A request that the engine has."""

    prompt_tokens: int
    tokens: int = 0


class EngineClient:
    """The engine's thread owns the engine; requests go in, chunks come out, by queues."""

    count_source = "engine"
    warnings: Sequence[str] = ()

    def __init__(self, engine: SteppedEngine, *, vocab_size: int) -> None:
        self.vocab_size: int | None = vocab_size
        self.max_model_len: int | None = engine.max_model_len
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[str, Request | None] | None] = queue.SimpleQueue()
        self._answers: dict[str, asyncio.Queue[Event]] = {}
        self._ids = (f"bench-{n}" for n in itertools.count())
        self._thread = threading.Thread(target=self._run, name="bench-engine", daemon=True)
        self._failure: EngineError | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *failure: object) -> None:
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def send(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """A chunk a step, stamped when the step returned; an unfinished request is aborted."""
        if self._failure is not None:
            raise self._failure
        name = next(self._ids)
        answer = self._answers[name] = asyncio.Queue()
        self._inbox.put((name, request))
        finished = False
        try:
            while not finished:
                event = await answer.get()
                finished = not isinstance(event, Chunk)
                if isinstance(event, InfoptError):
                    raise event
                if event is not None:
                    yield event
        finally:
            del self._answers[name]
            if not finished:
                self._inbox.put((name, None))

    async def server_metrics(self) -> str | None:
        """None: there is no server."""
        return None

    # The rest runs in the engine's thread.

    def _run(self) -> None:
        flights: dict[str, _Flight] = {}
        try:
            while self._drain(flights):
                if self._engine.has_work():
                    outputs = self._engine.step()
                    now = perf_counter()
                    for output in outputs:
                        self._report(output, now, flights)
        except Exception as error:
            self._failure = EngineError(f"the engine failed: {type(error).__name__}: {error}")
            for name in flights:
                self._tell(name, self._failure)
            while (message := self._inbox.get()) is not None:
                self._tell(message[0], self._failure)

    def _drain(self, flights: dict[str, _Flight]) -> bool:
        """Take in what waits, blocking when there is nothing to do; False when told to end."""
        while True:
            try:
                message = self._inbox.get(block=not self._engine.has_work())
            except queue.Empty:
                return True
            if message is None:
                return False
            name, request = message
            if request is None:
                self._engine.abort(name)
                flights.pop(name, None)
            else:
                self._add(name, request, flights)

    def _add(self, name: str, request: Request, flights: dict[str, _Flight]) -> None:
        assert not isinstance(request.prompt, str), "the vocabulary is known: prompts are ids"
        params = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
        try:
            self._engine.add(name, request.prompt, params)
            flights[name] = _Flight(len(request.prompt))
        except InfoptError as error:
            self._tell(name, error)

    def _report(self, output: StepOutput, now: float, flights: dict[str, _Flight]) -> None:
        name = output.request_id
        if name not in flights:
            return
        flight = flights[name]
        flight.tokens += len(output.token_ids)
        if output.token_ids:
            self._tell(name, Chunk(now, True, flight.tokens, flight.prompt_tokens))
        if output.finish_reason is not None:
            del flights[name]
            bad = output.finish_reason in ("error", "abort")
            reason = output.error or output.finish_reason
            self._tell(name, EngineError(f"the engine failed: {reason}") if bad else None)

    def _tell(self, name: str, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._put, name, event)

    def _put(self, name: str, event: Event) -> None:
        answer = self._answers.get(name)
        if answer is not None:
            answer.put_nowait(event)
