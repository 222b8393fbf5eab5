"""From what was seen of a level to its part of the report: pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from infopt.core.bench.level import Ran
from infopt.core.bench.metrics import (
    LATENCIES,
    chunk_gaps,
    completed,
    percentiles,
    tail_percentiles,
    token_gaps,
    tokens_between,
    values,
)
from infopt.core.bench.runner import STOPPED
from infopt.core.bench.slo import kept
from infopt.core.bench.validity import P99_SAMPLES, invalid_reasons, littles_law
from infopt.core.bench.window import Window, closed_window, open_window
from infopt.core.recipe.bench import BenchSettings
from infopt.core.reports.bench import LevelReport, TailPercentiles
from infopt.core.reports.requests import RequestRecord


def level_report(ran: Ran, settings: BenchSettings) -> LevelReport:
    """Every figure of a level; there is at least one record."""
    load, records = ran.load, ran.records
    done = completed(records)
    duration = ran.end - ran.start
    output = sum(record.output_tokens for record in done)
    prompt = sum(prompt_tokens(record, settings) for record in done)
    window = open_window(records) if load.is_open else _closed(ran)
    return LevelReport(
        level=load.level,
        requests=len(records),
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(r.error for r in records if r.error is not None)),
        concurrency=load.concurrency,
        request_rate=load.request_rate,
        max_concurrency=load.max_concurrency,
        duration_s=duration,
        **_latencies(records),
        with_failures=_tails(records),
        prompt_tokens=prompt,
        output_tokens=output,
        output_tokens_per_s=output / duration,
        steady_output_tokens_per_s=_rate_in(window, done),
        steady_window_s=window,
        total_tokens_per_s=(prompt + output) / duration,
        requests_per_s=len(done) / duration,
        token_count_source=_source(done),
        cost_per_million_output_tokens=_cost(settings, output / duration),
        stopped_early=ran.stopped,
        notes=tuple(_notes(records, settings)),
        **_kept(ran, settings, duration),
        **_validity(ran, settings),
    )


def prompt_tokens(record: RequestRecord, settings: BenchSettings) -> int:
    """As the target counted, else as asked for in the mean of the range."""
    if record.prompt_tokens is not None:
        return record.prompt_tokens
    return sum(settings.prompt_range) // 2


def _latencies(records: Sequence[RequestRecord]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}_s": percentiles(values(records, name)) for name in LATENCIES}
    return found | {
        "itl_s": percentiles(token_gaps(records)),
        "chunk_gap_s": percentiles(chunk_gaps(records)),
        "lag_s": percentiles([record.lag for record in records]),
    }


def _tails(records: Sequence[RequestRecord]) -> dict[str, TailPercentiles]:
    failed = sum(not record.completed for record in records)
    found = {f"{name}_s": tail_percentiles(values(records, name), failed) for name in LATENCIES}
    return {key: tail for key, tail in found.items() if tail is not None}


def _closed(ran: Ran) -> Window | None:
    assert ran.load.concurrency is not None
    return closed_window(ran.records, ran.load.concurrency)


def _rate_in(window: Window | None, done: Sequence[RequestRecord]) -> float | None:
    if window is None:
        return None
    start, end = window
    return tokens_between(done, start, end) / (end - start)


def _cost(settings: BenchSettings, rate: float) -> float | None:
    if settings.price_per_hour is None or rate <= 0:
        return None
    return settings.price_per_hour * 1e6 / (3600 * rate)


def _kept(ran: Ran, settings: BenchSettings, duration: float) -> dict[str, Any]:
    if not settings.limits:
        return {}
    found = kept(ran.records, settings.limits)
    reached = found.attainment >= settings.target_attainment
    return {
        "goodput": found.good / duration,
        "attainment": found.attainment,
        "good_without_tpot": found.without_tpot,
        "met": reached and ran.stopped is None,
    }


def _validity(ran: Ran, settings: BenchSettings) -> dict[str, Any]:
    in_flight = [look.in_flight for look in ran.looks]
    little = littles_law(ran.records, in_flight, ran.start, ran.end)
    reasons = list(
        invalid_reasons(
            ran.records,
            open_loop=ran.load.is_open,
            loop_lags=ran.loop_lags,
            little=little,
            max_failed=settings.max_failed,
        )
    )
    if ran.stopped is not None:
        reasons.insert(0, f"broken off: {ran.stopped}")
    return {
        "littles_law": little,
        "loop_lag_s": percentiles(ran.loop_lags),
        "valid": not reasons,
        "invalid_reasons": tuple(reasons),
    }


def _source(done: Sequence[RequestRecord]) -> str:
    found = {record.count_source for record in done}
    return "mixed" if len(found) > 1 else found.pop() if found else "chunks"


def _notes(records: Sequence[RequestRecord], settings: BenchSettings) -> Iterator[str]:
    done = completed(records)
    if len(done) < P99_SAMPLES:
        yield f"p99 is doubtful: of {len(done)} requests, not {P99_SAMPLES} or more"
    alone = sum(record.tpot is None for record in done)
    if alone and "tpot" in settings.limits:
        yield f"{alone} requests have no TPOT (one read): its limit asks nothing of them"
    elif alone:
        yield f"{alone} requests have no TPOT (one read) and are not in its percentiles"


def doubts(records: Sequence[RequestRecord]) -> Iterator[str]:
    """What the reader of the numbers must know of all levels together."""
    done = completed(records)
    if failed := sum(record.error not in (None, STOPPED) for record in records):
        yield f"{failed} requests failed and are in no percentile but those with failures"
    if uncounted := sum(record.count_source == "chunks" for record in done):
        yield (
            f"{uncounted} answers came without a usable token count: "
            "each chunk with text counts as one token"
        )
    if guessed := sum(record.guessed for record in done):
        yield (
            f"{guessed} answers had chunks of several tokens: TPOT takes their first chunk for one"
        )
    if unknown := sum(record.prompt_tokens is None for record in done):
        yield f"{unknown} answers did not tell the prompt's tokens: the number asked for is used"
    short = [r for r in done if r.asked_tokens is not None and r.output_tokens < r.asked_tokens]
    if short:
        mean = sum(record.output_tokens for record in short) / len(short)
        asked = sum(record.asked_tokens or 0 for record in short) / len(short)
        yield (
            f"{len(short)} answers ended early: {mean:.0f} tokens in the mean, {asked:.0f} asked"
        )
