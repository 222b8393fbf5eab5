"""The door: a closed loop of requests, and what its clients saw."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from time import perf_counter

from infopt.core.bench.client import Chunk, Client, Request
from infopt.core.bench.metrics import Failure, Sample, measure, percentiles, steady_rate
from infopt.core.bench.workload import synthetic
from infopt.core.errors import EngineError, InfoptError, UsageError
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.bench import BenchSettings
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.schema import Origin

_MEASURED = (
    "completed",
    "failed",
    "errors",
    "duration_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "prompt_tokens",
    "output_tokens",
    "output_tokens_per_s",
    "steady_output_tokens_per_s",
    "total_tokens_per_s",
)
# What was asked for, not found out.
_SET = ("requests", "concurrency")


def bench(
    client: Client,
    settings: BenchSettings,
    *,
    target: str,
    progress: ProgressCallback = silent,
) -> BenchReport:
    """Send `settings.requests` at `settings.concurrency` and report latencies and throughput.

    Raises EngineError if the target cannot be reached or no request completed,
    UsageError if the lengths exceed the model's limit.
    """
    return asyncio.run(_bench(client, settings, target, progress))


async def _bench(
    client: Client, settings: BenchSettings, target: str, progress: ProgressCallback
) -> BenchReport:
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(settings.timeout):
                await stack.enter_async_context(client)
        except TimeoutError:
            raise EngineError(f"{target} gave no answer within {settings.timeout:g} s") from None
        asked = settings.prompt_tokens + settings.output_tokens
        if client.max_model_len is not None and asked > client.max_model_len:
            raise UsageError(
                f"{settings.prompt_tokens} prompt and {settings.output_tokens} output tokens "
                f"exceed the model's limit of {client.max_model_len}",
                "lower --prompt-tokens or --output-tokens",
            )
        requests = synthetic(
            settings.warmup + settings.requests,
            settings.prompt_tokens,
            settings.output_tokens,
            seed=settings.seed,
            vocab_size=client.vocab_size,
        )
        warmup, load = requests[: settings.warmup], requests[settings.warmup :]
        await _closed_loop(client, warmup, settings, "warming up", progress)
        started = perf_counter()
        samples, failures = await _closed_loop(client, load, settings, "benching", progress)
        duration = perf_counter() - started
        return _report(client, settings, target, samples, failures, duration)


async def _closed_loop(
    client: Client,
    requests: Sequence[Request],
    settings: BenchSettings,
    stage: str,
    progress: ProgressCallback,
) -> tuple[list[Sample], list[Failure]]:
    """Workers that each send the next request when their last one ended."""
    samples: list[Sample] = []
    failures: list[Failure] = []
    waiting = iter(requests)

    async def work(waiting: Iterator[Request]) -> None:
        for request in waiting:
            result = await _one(client, request, settings.timeout)
            if isinstance(result, Sample):
                samples.append(result)
            else:
                failures.append(result)
            note = f"{len(failures)} failed" if failures else ""
            progress(Progress(stage, len(samples) + len(failures), len(requests), note))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(settings.concurrency, len(requests))):
                group.create_task(work(waiting))
    except ExceptionGroup as failed:
        if (fault := _known(failed)) is None:
            raise
        raise fault from fault.__cause__
    return samples, failures


def _known(failed: ExceptionGroup) -> InfoptError | None:
    """The first fault of infopt's own in a group, at any depth."""
    for error in failed.exceptions:
        found = _known(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(found, InfoptError):
            return found
    return None


async def _one(client: Client, request: Request, timeout: float) -> Sample | Failure:
    chunks: list[Chunk] = []
    sent = perf_counter()
    try:
        async with asyncio.timeout(timeout):
            stream = client.send(request)
            async with aclosing(stream):
                async for chunk in stream:
                    chunks.append(chunk)
    except TimeoutError:
        return Failure(sent, perf_counter(), f"no whole answer within {timeout:g} s")
    except InfoptError as error:
        return Failure(sent, perf_counter(), error.message)
    sample = measure(sent, chunks)
    return sample or Failure(sent, perf_counter(), "the answer held no text")


def _report(
    client: Client,
    settings: BenchSettings,
    target: str,
    samples: Sequence[Sample],
    failures: Sequence[Failure],
    duration: float,
) -> BenchReport:
    errors = Counter(failure.error for failure in failures)
    if not samples:
        reason, count = errors.most_common(1)[0]
        raise EngineError(f"none of {len(failures)} requests completed; {count} times: {reason}")
    output = sum(sample.tokens for sample in samples)
    prompt = sum(_prompt_tokens(sample, settings) for sample in samples)
    provenance: dict[str, Origin] = {key: "measured" for key in _MEASURED}
    provenance |= {key: "computed" for key in _SET}
    return BenchReport(
        provenance=provenance,
        warnings=(*client.warnings, *_doubts(samples, failures, settings)),
        target=target,
        requests=settings.requests,
        completed=len(samples),
        failed=len(failures),
        errors=dict(errors),
        concurrency=settings.concurrency,
        duration_s=duration,
        ttft_s=percentiles([sample.ttft for sample in samples]),
        tpot_s=percentiles([s.tpot for s in samples if s.tpot is not None]),
        e2e_s=percentiles([sample.e2e for sample in samples]),
        prompt_tokens=prompt,
        output_tokens=output,
        output_tokens_per_s=output / duration,
        steady_output_tokens_per_s=steady_rate(samples, failures, settings.concurrency),
        total_tokens_per_s=(prompt + output) / duration,
        token_count_source=_source(client, samples),
    )


def _prompt_tokens(sample: Sample, settings: BenchSettings) -> int:
    return settings.prompt_tokens if sample.prompt_tokens is None else sample.prompt_tokens


def _source(client: Client, samples: Sequence[Sample]) -> str:
    counted = {sample.counted for sample in samples}
    return "mixed" if len(counted) == 2 else client.count_source if True in counted else "chunks"


def _doubts(
    samples: Sequence[Sample], failures: Sequence[Failure], settings: BenchSettings
) -> Iterator[str]:
    """What the reader of the numbers must know."""
    if failures:
        yield f"{len(failures)} requests failed and are in no percentile"
    if uncounted := sum(not sample.counted for sample in samples):
        yield (
            f"{uncounted} answers came without a usable token count: "
            "each chunk with text counts as one token"
        )
    if guessed := sum(sample.guessed_first for sample in samples):
        yield (
            f"{guessed} answers had chunks of several tokens: TPOT takes their first chunk for one"
        )
    if unknown := sum(sample.prompt_tokens is None for sample in samples):
        yield f"{unknown} answers did not tell the prompt's tokens: the number asked for is used"
    short = [s.tokens for s in samples if s.tokens < settings.output_tokens]
    if short:
        mean = sum(short) / len(short)
        yield (
            f"{len(short)} answers ended early: {mean:.0f} tokens in the mean, "
            f"{settings.output_tokens} asked"
        )
