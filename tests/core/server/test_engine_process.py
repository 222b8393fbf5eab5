"""The engine's loop and its client over a real socket, with a scripted engine."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from infopt.core.errors import EngineError, UsageError
from infopt.core.runtime.request import Joined, SamplingParams, StepOutput
from infopt.core.runtime.stats import EngineStats
from infopt.core.server import messages
from infopt.core.server.engine_client import EngineClient
from infopt.core.server.engine_process import run


@dataclass
class Fake:
    """Answers with 0, 1, 2, ... ; refuses empty prompts; fails a prompt of -1; breaks on -2."""

    max_model_len: int = 64
    cache_tokens: int = 640
    joined: Sequence[Joined] = ()
    saved: int = 0
    running: dict[str, list[int]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    steps: int = 0
    _new: list[Joined] = field(default_factory=list)

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        if not prompt:
            raise UsageError("the prompt is empty")
        assert params.max_tokens is not None
        self.running[request_id] = [prompt[0], params.max_tokens, 0]
        self._new.append(Joined(request_id, 0.25, 3))

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[StepOutput]:
        time.sleep(0.001)
        self.steps += 1
        self.joined, self._new = self._new, []
        outputs = []
        for name, state in list(self.running.items()):
            if state[0] == -2:
                raise RuntimeError("kernel panic")
            if state[0] == -1:
                outputs.append(StepOutput(name, finish_reason="error", error="not finite"))
            else:
                state[2] += 1
                reason: Any = "length" if state[2] == state[1] else None
                outputs.append(StepOutput(name, (state[2] - 1,), reason))
            if outputs[-1].finish_reason:
                del self.running[name]
        return outputs

    def stats(self) -> EngineStats:
        values = dict.fromkeys(EngineStats.__dataclass_fields__, len(self.running))
        return EngineStats(**{**values, "steps": self.steps, "step_sizes": (1, 2)})

    def save_prefixes(self) -> None:
        self.saved += 1


def together(folder: Path, test: Callable[[EngineClient, Fake], Awaitable[None]]) -> None:
    """Run a test with the loop in a thread; the thread must survive nothing but its own faults."""
    engine, address = Fake(), f"ipc://{folder}/s"

    def loop() -> None:
        context = zmq.Context()
        channel = context.socket(zmq.DEALER)
        channel.setsockopt(zmq.LINGER, 200)
        channel.connect(address)
        try:
            run(engine, channel)
        except Exception as error:
            channel.send(messages.failed(error))
        finally:
            channel.close()
            context.term()

    async def main() -> None:
        context = zmq.asyncio.Context()
        channel = context.socket(zmq.DEALER)
        channel.setsockopt(zmq.LINGER, 200)
        channel.bind(address)
        thread = threading.Thread(target=loop)
        thread.start()
        client = EngineClient(channel)
        task = asyncio.create_task(client.run())
        try:
            async with asyncio.timeout(20):
                await client.limits
                await test(client, engine)
        finally:
            with suppress(zmq.Again):
                await channel.send(messages.pack("break the loop"), zmq.NOBLOCK)
            await asyncio.to_thread(thread.join)
            task.cancel()
            channel.close()
            context.term()

    asyncio.run(main())


async def tokens(client: EngineClient, prompt: list[int], count: int = 5) -> list[int]:
    params = SamplingParams(max_tokens=count)
    return [t async for output in client.generate(prompt, params) for t in output.token_ids]


def test_many_answers_over_one_socket(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        assert (await client.limits).max_model_len == 64
        found = await asyncio.gather(*(tokens(client, [1], n) for n in range(1, 30)))
        assert found == [list(range(n)) for n in range(1, 30)]

    together(tmp_path, test)


def test_faults_stay_with_their_request(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        results = await asyncio.gather(
            tokens(client, [1]), tokens(client, []), tokens(client, [-1]), return_exceptions=True
        )
        assert results[0] == [0, 1, 2, 3, 4]
        assert isinstance(results[1], UsageError) and "empty" in str(results[1])
        assert isinstance(results[2], EngineError) and "not finite" in str(results[2])
        assert await tokens(client, [1]) == [0, 1, 2, 3, 4]

    together(tmp_path, test)


def test_closing_early_aborts(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        answer = client.generate([1], SamplingParams(max_tokens=10**6))
        async with aclosing(answer):
            await anext(answer)
        while engine.running:
            await asyncio.sleep(0.005)
        assert len(engine.aborted) == 1

    together(tmp_path, test)


def test_cancelling_aborts(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        task = asyncio.create_task(tokens(client, [1], 10**6))
        while not engine.running:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while engine.running:
            await asyncio.sleep(0.005)
        assert len(engine.aborted) == 1

    together(tmp_path, test)


def test_it_is_told_when_a_request_waits_no_longer(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        heard: list[Joined] = []
        answer = client.generate([1], SamplingParams(max_tokens=3), on_join=heard.append)
        assert [t async for output in answer for t in output.token_ids] == [0, 1, 2]
        assert [(each.waited_s, each.cached_tokens) for each in heard] == [(0.25, 3)]

    together(tmp_path, test)


@pytest.mark.parametrize("early", [True, False])
def test_what_comes_of_until_ends_a_request_in_the_engine_too(tmp_path: Path, early: bool) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        until: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        if early:
            until.set_result(UsageError("time is up"))
        answer = client.generate([1], SamplingParams(max_tokens=10**6), until=until)
        with pytest.raises(UsageError, match="time is up"):
            async for _ in answer:
                if not until.done():
                    until.set_result(UsageError("time is up"))
        while engine.running or not engine.aborted:
            await asyncio.sleep(0.005)

    together(tmp_path, test)


def test_told_to_stop_it_saves_its_prefixes_and_ends(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        await tokens(client, [1])
        await client.stop()
        while not engine.saved:
            await asyncio.sleep(0.005)

    together(tmp_path, test)


def test_idle_it_does_not_step_and_still_answers(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        await tokens(client, [1])
        steps = engine.steps
        await asyncio.sleep(0.1)
        assert engine.steps == steps
        assert (await client.stats(5))["steps"] == steps

    together(tmp_path, test)


def test_a_broken_engine_fails_all_that_wait_and_all_that_come(tmp_path: Path) -> None:
    async def test(client: EngineClient, engine: Fake) -> None:
        long = asyncio.create_task(tokens(client, [1], 10**6))
        while not engine.running:
            await asyncio.sleep(0.005)
        results = await asyncio.gather(long, tokens(client, [-2]), return_exceptions=True)
        assert all(isinstance(r, EngineError) and "kernel panic" in str(r) for r in results)
        with pytest.raises(EngineError, match="kernel panic"):
            await tokens(client, [1])
        with pytest.raises(EngineError, match="kernel panic"):
            await client.stats(5)

    together(tmp_path, test)
