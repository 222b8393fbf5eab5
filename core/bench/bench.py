"""The door: a load, level by level, and what its clients saw."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from time import perf_counter

from infopt.core.bench.client import Client, Session
from infopt.core.bench.figures import doubts, level_report
from infopt.core.bench.level import Load, Ran, Stop, run_level
from infopt.core.bench.levels import loads, search, trace_load
from infopt.core.bench.scrape import Looks, Scraper, summed
from infopt.core.bench.series import series
from infopt.core.bench.sessions import longest, sessions, traced
from infopt.core.errors import EngineError, UsageError
from infopt.core.progress import ProgressCallback, silent
from infopt.core.recipe.bench import BenchSettings
from infopt.core.reports.bench import BenchReport, Capacity, LevelReport, LoadFigures
from infopt.core.reports.requests import RequestRecord
from infopt.core.reports.schema import Origin

# What was asked for, not found out.
_SET = ("requests", "concurrency", "request_rate", "max_concurrency", "slo", "level")
_COMPUTED = ("cost_per_million_output_tokens", "valid")
_WORDS = frozenset({"token_count_source", "notes", "invalid_reasons", "stopped_early"})
Keep = Callable[[Sequence[RequestRecord]], None]


def bench(
    client: Client,
    settings: BenchSettings,
    *,
    target: str,
    progress: ProgressCallback = silent,
    keep: Keep | None = None,
) -> BenchReport:
    """Send the load that `settings` describe and report latencies, throughput and goodput.

    `keep` is handed the record of every request. Raises EngineError if the target cannot be reached
    or no request completed, UsageError if the lengths exceed the model's limit, or a file of
    requests cannot be read.
    """
    return asyncio.run(_bench(client, settings, target, progress, keep))


async def _bench(
    client: Client,
    settings: BenchSettings,
    target: str,
    progress: ProgressCallback,
    keep: Keep | None,
) -> BenchReport:
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(settings.timeout):
                await stack.enter_async_context(client)
        except TimeoutError:
            raise EngineError(f"{target} gave no answer within {settings.timeout:g} s") from None
        _check_lengths(client, settings)
        bencher = _Bencher(client, settings, progress)
        done, capacity = await bencher.run()
        records = [record for ran in done for record in ran.records]
        if keep is not None:
            keep(records)
        return _report(bencher, target, done, capacity)


def _check_lengths(client: Client, settings: BenchSettings) -> None:
    asked = longest(settings)
    if asked is not None and client.max_model_len is not None and sum(asked) > client.max_model_len:
        raise UsageError(
            f"{asked[0]} prompt and {asked[1]} output tokens "
            f"exceed the model's limit of {client.max_model_len}",
            "lower --prompt-tokens or --output-tokens",
        )


@dataclass
class _Bencher:
    """One run: warm up, then every level, with the server's own figures read beside."""

    client: Client
    settings: BenchSettings
    progress: ProgressCallback
    origin: float = 0.0
    scraper: Scraper | None = None
    """None while the load is not counted, and where the server tells nothing."""
    looks: dict[int, Looks] = field(default_factory=dict)
    """What the server told during each level, and just before and after it."""

    async def run(self) -> tuple[list[Ran], Capacity | None]:
        source = sessions(self.settings, self.client.vocab_size)
        plan = None if self.settings.trace is None else trace_load(self.settings)
        await self._warm_up(source)
        self.origin = perf_counter()
        beside = await self._scraping()
        capacity = None
        try:
            if plan is not None:
                load, rows = plan
                source = traced(rows, self.settings.seed, self.client.vocab_size)
                done = [await self._level(load, source)]
            elif self.settings.find_capacity:
                done, capacity = await search(
                    self.settings, lambda load, stop: self._level(load, source, stop)
                )
            else:
                done = [await self._level(load, source) for load in loads(self.settings)]
        finally:
            if beside is not None:
                beside.cancel()
                with suppress(asyncio.CancelledError):
                    await beside
        return done, capacity

    async def _scraping(self) -> asyncio.Task[None] | None:
        """Read the server's figures beside the load; where it has none, only if nobody insists."""
        if self.settings.scrape is False:
            return None
        scraper = Scraper(self.client.server_metrics, self.origin)
        if await scraper.look():
            self.scraper = scraper
            return asyncio.create_task(scraper.run())
        if self.settings.scrape:
            raise EngineError(
                "the server has no /metrics of infopt's or vLLM's names", "leave out --scrape"
            )
        return None

    async def _warm_up(self, source: Iterator[Session]) -> None:
        count = self.settings.warmup
        if count:
            load = Load(0, count, concurrency=self.settings.concurrency or 1)
            await self._level(load, itertools.islice(source, count), stage="warming up")

    async def _level(
        self,
        load: Load,
        source: Iterator[Session],
        stop: Stop | None = None,
        stage: str | None = None,
    ) -> Ran:
        first = 0 if self.scraper is None else await self.scraper.mark()
        ran = await run_level(
            self.client,
            load,
            source,
            timeout=self.settings.timeout,
            origin=self.origin,
            stage=stage or _stage(load, self.settings),
            progress=self.progress,
            stop=stop,
        )
        if self.scraper is not None:
            await self.scraper.look()
            self.looks[load.level] = self.scraper.seen[first:]
        return ran


def _stage(load: Load, settings: BenchSettings) -> str:
    if settings.sweep is None and not settings.find_capacity:
        return "benching"
    if load.request_rate is not None:
        return f"benching at {load.request_rate:.4g} requests/s"
    return f"benching {load.concurrency} at once"


def _report(
    bencher: _Bencher, target: str, done: Sequence[Ran], capacity: Capacity | None
) -> BenchReport:
    client, settings = bencher.client, bencher.settings
    records = [record for ran in done for record in ran.records]
    if not any(record.completed for record in records):
        raise _none_completed(records)
    levels = [
        level_report(ran, settings).model_copy(
            update={"server": summed(bencher.looks.get(ran.load.level, ()), timeline=False)}
        )
        for ran in done
        if ran.records
    ]
    headline = _headline(levels, capacity, settings)
    shared = {key: getattr(headline, key) for key in LoadFigures.model_fields}
    met = [level.goodput for level in levels if level.met and level.goodput is not None]
    return BenchReport(
        **shared,
        provenance=provenance(),
        warnings=(*client.warnings, *doubts(records)),
        target=target,
        load="trace" if settings.trace else "open loop" if settings.is_open else "closed loop",
        workload=settings.workload,
        slo=settings.limits,
        level=headline.level,
        levels=tuple(levels) if len(levels) > 1 else (),
        max_goodput=max(met, default=None),
        capacity=capacity,
        server=summed(() if bencher.scraper is None else bencher.scraper.seen),
        series=series(records),
    )


def _none_completed(records: Sequence[RequestRecord]) -> EngineError:
    errors = [record.error for record in records if record.error is not None]
    if not errors:
        return EngineError("no request was begun within the duration", "give it more time")
    reason = max(set(errors), key=errors.count)
    return EngineError(
        f"none of {len(errors)} requests completed; {errors.count(reason)} times: {reason}"
    )


def _headline(
    levels: Sequence[LevelReport], capacity: Capacity | None, settings: BenchSettings
) -> LevelReport:
    """Whose figures stand at the top: the capacity's, else the greatest goodput or throughput."""
    if capacity is not None and capacity.request_rate is not None:
        return next(
            level
            for level in reversed(levels)
            if level.met and level.request_rate == capacity.request_rate
        )
    usable = [level for level in levels if level.completed] or list(levels)
    if settings.limits:
        return max(usable, key=lambda level: level.goodput or 0.0)
    return max(usable, key=lambda level: level.output_tokens_per_s)


def provenance() -> dict[str, Origin]:
    """Of every number of the report."""
    found: dict[str, Origin] = {}
    for key in (*LoadFigures.model_fields, "slo", "level", "levels", "max_goodput", "capacity"):
        if key not in _WORDS:
            told: Origin = "computed" if key in (*_SET, *_COMPUTED) else "measured"
            found[key] = told
    return found | {"server": "measured", "series": "measured"}
