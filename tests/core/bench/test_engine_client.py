import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from infopt.core.artifact.read import read_artifact
from infopt.core.bench.bench import bench
from infopt.core.bench.client import Request
from infopt.core.bench.engine_client import EngineClient
from infopt.core.errors import EngineError, UsageError
from infopt.core.recipe.bench import BenchSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams, StepOutput

SETTINGS = BenchSettings(requests=6, concurrency=3, prompt_tokens=16, output_tokens=5)


class Timed:
    """Prefills in 50 ms, then brings `each` tokens a step of 20 ms; a prompt of 7s is refused."""

    max_model_len = 1000

    def __init__(self, *, each: int = 1, break_at: int | None = None) -> None:
        self.each, self.break_at = each, break_at
        self.left: dict[str, int] = {}
        self.fresh: set[str] = set()
        self.steps = 0
        self.most = 0

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        assert params.ignore_eos and params.temperature == 0 and params.max_tokens is not None
        if set(prompt) == {7}:
            raise UsageError("no sevens")
        self.left[request_id] = params.max_tokens
        self.fresh.add(request_id)
        self.most = max(self.most, len(self.left))

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.left)

    def step(self) -> list[StepOutput]:
        time.sleep(0.05 if self.fresh else 0.02)
        self.fresh.clear()
        self.steps += 1
        if self.steps == self.break_at:
            raise RuntimeError("out of luck")
        outputs = []
        for name, left in list(self.left.items()):
            count = min(self.each, left)
            self.left[name] = left - count
            over: Any = "length" if left == count else None
            outputs.append(StepOutput(name, (1,) * count, over))
            if over:
                del self.left[name]
        return outputs


def test_known_times() -> None:
    engine = Timed(each=2)
    report = bench(EngineClient(engine, vocab_size=100), SETTINGS, target="engine")
    assert (report.completed, report.output_tokens, report.prompt_tokens) == (6, 30, 96)
    assert report.token_count_source == "engine" and report.warnings == ()
    assert report.ttft_s is not None and report.tpot_s is not None
    assert 0.05 <= report.ttft_s.min < 0.12
    assert 0.04 / 3 <= report.tpot_s.min < 0.03, "2 + 2 + 1 tokens: three in two steps"
    assert engine.most == 3


def test_the_real_engine(tiny_model: Path) -> None:
    engine = Engine.load(read_artifact(tiny_model), SETTINGS.model_copy(update={"kv_blocks": 32}))
    report = bench(EngineClient(engine, vocab_size=49152), SETTINGS, target="engine")
    assert report.completed == 6 and report.output_tokens == 30 and report.tpot_s is not None
    engine.check()
    assert engine.stats().blocks_used == 0


def test_what_the_engine_refuses_is_a_failure() -> None:
    async def run() -> None:
        async with EngineClient(Timed(), vocab_size=8) as client:
            for prompt, ok in (((7, 7), False), ((1, 2), True)):
                stream = client.send(Request(prompt, 3))
                if ok:
                    assert [c.completion_tokens async for c in stream] == [1, 2, 3]
                else:
                    with pytest.raises(UsageError, match="no sevens"):
                        await anext(stream)

    asyncio.run(run())


def test_leaving_early_aborts() -> None:
    engine = Timed()

    async def run() -> None:
        async with EngineClient(engine, vocab_size=8) as client:
            async with aclosing(client.send(Request((1,), 500))) as stream:
                await anext(stream)
            while engine.left:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_broken_engine_hangs_nobody() -> None:
    with pytest.raises(EngineError, match="the engine failed: RuntimeError: out of luck"):
        bench(EngineClient(Timed(break_at=1), vocab_size=8), SETTINGS, target="engine")


def test_a_timeout_frees_the_engine() -> None:
    engine = Timed()
    settings = SETTINGS.model_copy(update={"output_tokens": 500, "timeout": 0.1, "warmup": 0})
    with pytest.raises(EngineError, match="no whole answer within"):
        bench(EngineClient(engine, vocab_size=8), settings, target="engine")
    assert not engine.left
