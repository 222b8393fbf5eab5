"""Engines that die, sleep and come back, without processes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from infopt.core.errors import EngineError, InfoptError, ResourceError, UsageError
from infopt.core.runtime.request import SamplingParams, StepOutput
from infopt.core.server import supervisor as room
from infopt.core.server.messages import Limits
from infopt.core.server.supervisor import State, Supervisor


class Client:
    """Answers with one token."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def limits(self) -> "asyncio.Future[Limits]":
        found: asyncio.Future[Limits] = asyncio.get_running_loop().create_future()
        found.set_result(Limits(64, 640))
        return found

    async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[StepOutput, None]:
        yield StepOutput("a", (self.number,), "length")

    async def stats(self, timeout: float) -> dict[str, Any]:
        return {"number": self.number}


class Engines:
    """What starts them; `faults` are of those that do not load, by number."""

    def __init__(self, faults: dict[int, InfoptError] | None = None) -> None:
        self.faults = faults or {}
        self.started = self.ended = 0
        self.heard: list[str] = []
        self.die: Callable[[EngineError], None] = lambda death: None

    @asynccontextmanager
    async def start(self, died: Callable[[EngineError], None]) -> AsyncIterator[Any]:
        number = self.started
        self.started += 1
        if number in self.faults:
            raise self.faults[number]
        self.die = died
        try:
            yield Client(number)
        finally:
            self.ended += 1

    def lost(self, death: InfoptError, pause: float | None) -> None:
        self.heard.append(f"lost {pause}")

    def back(self) -> None:
        self.heard.append("back")

    def slept(self) -> None:
        self.heard.append("slept")


def supervised(
    test: Callable[[Supervisor, Engines], Awaitable[None]], engines: Engines | None = None
) -> Engines:
    found = engines or Engines()

    async def main() -> None:
        it = Supervisor(found.start, found)
        running = asyncio.create_task(it.run())
        async with asyncio.timeout(10):
            try:
                await test(it, found)
            finally:
                it.stop()
                await running
        assert found.ended == found.started - len(found.faults)

    asyncio.run(main())
    return found


async def ask(it: Supervisor, **more: Any) -> int:
    (output,) = [output async for output in it.generate([1], SamplingParams(), **more)]
    return output.token_ids[0]


async def until(state: State, it: Supervisor) -> None:
    while it.state is not state:
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FIRST_PAUSE_S", 0.01)


def test_the_next_engine_takes_a_dead_ones_place() -> None:
    async def test(it: Supervisor, engines: Engines) -> None:
        assert (await it.limits).max_model_len == 64
        assert await ask(it) == 0
        engines.die(EngineError("killed by signal 9"))
        with pytest.raises(EngineError, match="killed by signal 9"):
            await until(State.RESTARTING, it)
            await ask(it)
        with pytest.raises(EngineError, match="started again"):
            await it.stats(1)
        await until(State.READY, it)
        assert await ask(it) == 1 and await it.stats(1) == {"number": 1}
        assert it.restarts == 1

    assert supervised(test).heard == ["lost 0.01", "back"]


def test_pauses_double_until_it_is_given_up() -> None:
    faults: dict[int, InfoptError] = {n: ResourceError("no memory") for n in range(1, 9)}

    async def test(it: Supervisor, engines: Engines) -> None:
        await it.limits
        engines.die(EngineError("gone"))
        assert "no memory" in str(await it.over)
        assert it.state is State.FAILED
        with pytest.raises(EngineError, match="too often"):
            await ask(it)
        engines.faults = {n: engines.faults[n] for n in range(1, engines.started)}

    engines = supervised(test, Engines(faults))
    assert engines.heard == ["lost 0.01", "lost 0.02", "lost 0.04", "lost 0.08", "lost None"]


def test_a_token_forgives_the_deaths_before_it() -> None:
    async def test(it: Supervisor, engines: Engines) -> None:
        await it.limits
        for number in range(2 * room.MOST_DEATHS):
            assert await ask(it) == number
            engines.die(EngineError("gone"))
            await until(State.RESTARTING, it)
            await until(State.READY, it)

    assert set(supervised(test).heard) == {"lost 0.01", "back"}


def test_what_keeps_the_first_engine_from_loading_is_raised() -> None:
    async def test(it: Supervisor, engines: Engines) -> None:
        with pytest.raises(UsageError, match="too long"):
            await it.limits

    assert supervised(test, Engines({0: UsageError("too long")})).heard == []


def test_asleep_it_is_woken_by_who_asks() -> None:
    async def test(it: Supervisor, engines: Engines) -> None:
        await it.limits
        it.sleep()
        await until(State.ASLEEP, it)
        assert await asyncio.gather(ask(it), ask(it)) == [1, 1]
        assert it.restarts == 0 and engines.started == 2

    assert supervised(test).heard == ["slept"]


def test_who_asks_while_it_falls_asleep_is_answered_by_the_next() -> None:
    async def test(it: Supervisor, engines: Engines) -> None:
        await it.limits
        it.sleep()
        await asyncio.sleep(0)
        assert await ask(it) == 1

    supervised(test)


def test_who_waits_for_it_to_wake_may_be_ended() -> None:
    async def test(it: Supervisor, engines: Engines) -> None:
        over: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        over.set_result(UsageError("time is up"))
        # Still loading.
        with pytest.raises(UsageError, match="time is up"):
            await ask(it, until=over)

    supervised(test)


def test_stopped_in_a_pause_it_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FIRST_PAUSE_S", 30)

    async def test(it: Supervisor, engines: Engines) -> None:
        await it.limits
        engines.die(EngineError("gone"))
        await until(State.RESTARTING, it)

    assert supervised(test).heard == ["lost 30"]
