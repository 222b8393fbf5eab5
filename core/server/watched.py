"""The engine as one visit has it: its places in the queue, its end, and what is measured of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Protocol

from infopt.core.runtime.request import Joined, SamplingParams, StepOutput
from infopt.core.server.admission import Place
from infopt.core.server.metrics import Metrics
from infopt.core.server.visit import Passage, Visit


class Generator(Protocol):
    """What an engine's client does."""

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        ended: Collection[int] = (),
        *,
        on_join: Callable[[Joined], None] | None = None,
        until: "asyncio.Future[Exception] | None" = None,
    ) -> AsyncGenerator[StepOutput, None]: ...


class Watched:
    """One prompt's way through the engine."""

    def __init__(self, engine: Generator, visit: Visit, place: Place, metrics: Metrics) -> None:
        self._engine, self._visit, self._place, self._metrics = engine, visit, place, metrics
        self._passage = Passage(time.monotonic())
        self._last: dict[int, float] = {}
        """When each answer's last token came."""
        self._open: set[int] = set()

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, ended: Collection[int] = ()
    ) -> AsyncGenerator[StepOutput, None]:
        """As the engine's own."""
        self._passage.began = time.monotonic()
        self._visit.passages.append(self._passage)
        self._open = set(range(params.n))
        outputs = self._engine.generate(
            prompt, params, ended, on_join=self._joined, until=self._visit.until
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    self._note(output)
                    yield output
        finally:
            self._place.leave()
            # What the caller found to be over, by a stop string; the rest nobody waited for.
            for index in sorted(self._open):
                self._ended(index, "stop" if index in ended else "abort", time.monotonic())
            self._passage.ended = time.monotonic()

    def _joined(self, joined: Joined) -> None:
        self._place.leave()
        self._passage.waited = joined.waited_s
        self._visit.cached_tokens += joined.cached_tokens
        self._metrics.queue_time.observe(joined.waited_s)

    def _note(self, output: StepOutput) -> None:
        now, visit, metrics, way = time.monotonic(), self._visit, self._metrics, self._passage
        tokens = len(output.token_ids)
        if way.first is None and (tokens or output.finish_reason):
            way.first = now
            if way.waited is not None:
                metrics.prefill_time.observe(max(0.0, now - way.began - way.waited))
            metrics.ttft.observe(now - visit.received)
        if tokens:
            visit.first_token = visit.first_token or now
            visit.output_tokens += tokens
            metrics.generation_tokens.inc(tokens)
            if output.index in self._last:
                metrics.itl.observe(now - self._last[output.index])
            self._last[output.index] = now
        if output.finish_reason is not None:
            self._ended(output.index, output.finish_reason, now)

    def _ended(self, index: int, reason: str, now: float) -> None:
        self._open.discard(index)
        self._visit.finish_reasons.append(reason)
        self._metrics.answered(reason)
        self._metrics.e2e.observe(now - self._visit.received)
        if self._passage.first is not None:
            self._metrics.decode_time.observe(now - self._passage.first)
