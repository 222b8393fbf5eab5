"""Keep an engine alive: start it again when it dies, let it sleep when nobody asks."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from enum import StrEnum
from typing import Any, Protocol

from infopt.core.errors import EngineError, InfoptError
from infopt.core.runtime.request import Joined, SamplingParams, StepOutput
from infopt.core.server.engine_client import EngineClient
from infopt.core.server.messages import Limits

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Between a death and the next start; twice as long each time."""
MOST_DEATHS = 5
"""In a row, without a token in between: then it is not started again."""

Start = Callable[[Callable[[EngineError], None]], AbstractAsyncContextManager[EngineClient]]
"""An engine as a context, given what hears of its death."""


class State(StrEnum):
    """Where the engine is."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    """It died; the next one is on its way."""
    ASLEEP = "asleep"
    """Its memory is given back; the next request wakes it."""
    FAILED = "failed"
    """It died too often."""


class Listener(Protocol):
    """Who hears of the engine's life."""

    def lost(self, death: InfoptError, pause: float | None) -> None:
        """It died; the next one starts after `pause` seconds, or none does."""

    def back(self) -> None:
        """The next one is loaded."""

    def slept(self) -> None:
        """It sleeps."""


class Supervisor:
    """The engine as the routes have it, whichever process it is at the time."""

    def __init__(self, start: Start, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        self.state = State.LOADING
        self.restarts = 0
        self.limits: asyncio.Future[Limits] = loop.create_future()
        """Of the first engine; raises what kept it from loading."""
        self.over: asyncio.Future[InfoptError] = loop.create_future()
        """Done when it died too often."""
        self._start, self._listener = start, listener
        self._client: EngineClient | None = None
        self._death: InfoptError | None = None
        self._changed: asyncio.Future[None] = loop.create_future()
        """Done, and replaced, whenever the state changes."""
        self._leave, self._wake = asyncio.Event(), asyncio.Event()
        self._deaths = 0
        self._stopping = False

    async def run(self) -> None:
        """Until `stop`, or until the engine died too often."""
        while not self._stopping:
            death = await self._live()
            if self._stopping:
                return
            if death is None:
                self._listener.slept()
                await self._wake.wait()
                self._become(State.LOADING)
            elif not self.limits.done():
                self.limits.set_exception(death)
                return
            elif not await self._mourn(death):
                self.over.set_result(death)
                return

    async def _live(self) -> InfoptError | None:
        """One engine's life; None where it was sent to sleep, or stopped."""
        deaths: list[InfoptError] = []

        def died(death: InfoptError) -> None:
            self._death = death
            deaths.append(death)
            self._leave.set()

        self._leave.clear()
        if self._stopping:
            return None
        try:
            async with self._start(died) as client:
                if self.state is State.RESTARTING:
                    self.restarts += 1
                    self._listener.back()
                self._client = client
                self._wake.clear()
                self._become(State.READY)
                if not self.limits.done():
                    self.limits.set_result(await client.limits)
                await self._leave.wait()
                self._client = None  # before it ends: who comes now waits for the next one
                self._become(State.RESTARTING if deaths else State.ASLEEP)
        except InfoptError as error:  # it did not load
            return error
        finally:
            self._client = None
        return deaths[0] if deaths else None

    async def _mourn(self, death: InfoptError) -> bool:
        """Wait before the next start; False where there is to be none."""
        self._deaths += 1
        self._death = death
        if self._deaths == MOST_DEATHS:
            self._become(State.FAILED)
            self._listener.lost(death, None)
            return False
        pause = min(FIRST_PAUSE_S * 2 ** (self._deaths - 1), LONGEST_PAUSE_S)
        self._become(State.RESTARTING)
        self._listener.lost(death, pause)
        self._leave.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._leave.wait(), pause)  # `stop` does not wait for it
        return True

    def sleep(self) -> None:
        """Let the engine's process end until the next request."""
        if self.state is State.READY:
            self._leave.set()

    def stop(self) -> None:
        """Let the engine's process end, and `run` with it."""
        self._stopping = True
        self._leave.set()
        self._wake.set()

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        ended: Collection[int] = (),
        *,
        on_join: Callable[[Joined], None] | None = None,
        until: "asyncio.Future[Exception] | None" = None,
    ) -> AsyncGenerator[StepOutput, None]:
        """As the engine's client; where the engine sleeps, it is woken first."""
        client = await self._awake(until)
        outputs = client.generate(prompt, params, ended, on_join=on_join, until=until)
        async with aclosing(outputs):
            async for output in outputs:
                self._deaths = 0
                yield output

    async def stats(self, timeout: float) -> dict[str, Any]:
        """The engine's counts; EngineError where there is none that answers."""
        if self._client is None:
            raise EngineError(self._why())
        return await self._client.stats(timeout)

    async def _awake(self, until: "asyncio.Future[Exception] | None") -> EngineClient:
        """The engine's client, as soon as there is one; raises what comes of `until` before that,
        or EngineError where the engine is not there for another reason than sleep."""
        while self._client is None:
            if self.state in (State.RESTARTING, State.FAILED) or self._stopping:
                raise EngineError(self._why())
            self._wake.set()
            waited: set[asyncio.Future[Any]] = {self._changed}
            if until is not None:
                waited.add(until)
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if until is not None and until.done():
                raise until.result()
        return self._client

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def _why(self) -> str:
        died = "" if self._death is None else f"{self._death.message}; "
        match self.state:
            case State.RESTARTING:
                return f"{died}it is being started again"
            case State.FAILED:
                return f"{died}it died too often to be started again"
            case State.ASLEEP:
                return "the engine sleeps until the next request"
        return "the engine is loading"
