"""`infopt bench`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


def bench(
    model: opt.Model = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", help="Any OpenAI-compatible server; MODEL is then the name it is asked for."
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", help="Requests counted.", show_default="16")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Requests in flight.", show_default="4")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Tokens per prompt.", show_default="128")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output-tokens", help="Tokens per answer.", show_default="32")
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option("--warmup", help="Requests sent first and not counted.", show_default="1"),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", help="Seconds after which a request has failed.", show_default="600"
        ),
    ] = None,
    block_size: opt.BlockSize = None,
    kv_blocks: opt.KvBlocks = None,
    kv_dtype: opt.KvDType = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_chunk_tokens: opt.MaxChunkTokens = None,
    max_running: opt.MaxRunning = None,
    max_model_len: opt.MaxModelLen = None,
    batching: opt.Batching = None,
    batch_wait_ms: opt.BatchWaitMs = None,
    watermark: opt.Watermark = None,
    prefix_caching: opt.PrefixCaching = None,
    prefix_host_bytes: opt.PrefixHostBytes = None,
    prefix_disk: opt.PrefixDisk = None,
    prefix_disk_bytes: opt.PrefixDiskBytes = None,
    deterministic: opt.Deterministic = None,
    recipe: opt.RecipeFile = None,
    output: opt.ReportOutput = None,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = None,
    seed: opt.Seed = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Load a server or the engine: TTFT, TPOT, throughput.

    Example: infopt bench --url http://127.0.0.1:8000 --concurrency 8
    """
    from infopt.cli.verb import run_verb
    from infopt.core.errors import UsageError

    load: dict[str, Any] = {
        "url": url,
        "requests": requests,
        "concurrency": concurrency,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "warmup": warmup,
        "timeout": timeout,
    }
    engine: dict[str, Any] = {
        "block_size": block_size,
        "kv_blocks": kv_blocks,
        "kv_dtype": kv_dtype,
        "max_batch_tokens": max_batch_tokens,
        "max_chunk_tokens": max_chunk_tokens,
        "max_running": max_running,
        "max_model_len": max_model_len,
        "batching": batching,
        "batch_wait_ms": batch_wait_ms,
        "watermark": watermark,
        "prefix_caching": prefix_caching,
        "prefix_host_bytes": prefix_host_bytes,
        "prefix_disk": prefix_disk,
        "prefix_disk_bytes": prefix_disk_bytes,
        "deterministic": deterministic,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    asked = [key for key, value in engine.items() if value is not None]
    asked += [key for key in ("device", "dtype") if getattr(common, key) is not None]
    if url is not None and asked:
        option = asked[0].replace("_", "-")
        raise UsageError(f"--{option} is the server's to choose", "leave it out with --url")
    run_verb("bench", model, load | engine, common, perform, plan)


def perform(work: "Work") -> "Report":
    from infopt.core.bench.bench import bench as door

    settings = work.settings
    if settings.url is not None:
        from infopt.core.bench.http_client import HttpClient

        name = work.model if isinstance(work.model, str) else None
        return door(
            HttpClient(settings.url, model=name),
            settings,
            target=settings.url,
            progress=work.screen.progress,
        )
    from infopt.core.bench.engine_client import EngineClient
    from infopt.core.runtime.engine import Engine

    engine = Engine.load(work.artifact, settings)
    client = EngineClient(engine, vocab_size=work.artifact.config["vocab_size"])
    report = door(client, settings, target="engine", progress=work.screen.progress)
    return report.model_copy(update={"model": work.artifact.summary()})


def plan(work: "Work") -> "Plan":
    """What the load is; its time is known only once it ran."""
    from infopt.core.reports.schema import Plan

    settings = work.settings
    load = (
        f"send {settings.requests} requests, {settings.concurrency} at once, "
        f"{settings.prompt_tokens} tokens in and {settings.output_tokens} out each"
    )
    if settings.url is not None:
        return Plan(
            command="bench", actions=(f"{load}, to {settings.url}",), memory_bytes=2 * 10**8
        )
    from infopt.core.server.plan import plan_serve

    engine = plan_serve(work.artifact, settings)
    return Plan(command="bench", actions=(*engine.actions, load), memory_bytes=engine.memory_bytes)
