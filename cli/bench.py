"""`infopt bench`."""

from typing import TYPE_CHECKING, Any

import typer

from infopt.cli import bench_words as word
from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


def bench(
    context: typer.Context,
    model: opt.Model = None,
    url: word.Url = None,
    engine: word.Engine = None,
    endpoint: word.EndpointOption = None,
    api_key_env: word.ApiKeyEnv = None,
    scrape: word.Scrape = None,
    requests: word.Requests = None,
    duration: word.Duration = None,
    concurrency: word.Concurrency = None,
    request_rate: word.RequestRate = None,
    arrival: word.Arrival = None,
    burstiness: word.Burstiness = None,
    max_concurrency: word.MaxConcurrency = None,
    trace: word.Trace = None,
    speedup: word.Speedup = None,
    sweep: word.Sweep = None,
    find_capacity: word.FindCapacity = None,
    slo: word.SloOption = None,
    attainment: word.Attainment = None,
    workload: word.WorkloadOption = None,
    prompt_tokens: word.PromptTokens = None,
    output_tokens: word.OutputTokens = None,
    prefix_tokens: word.PrefixTokens = None,
    prefixes: word.Prefixes = None,
    turns: word.Turns = None,
    dataset: word.Dataset = None,
    price_per_hour: word.PricePerHour = None,
    max_failed: word.MaxFailed = None,
    warmup: word.Warmup = None,
    timeout: word.Timeout = None,
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
    threads: opt.Threads = None,
    kernels: opt.Kernels = None,
    activations: opt.Activations = None,
    repack_cache: opt.RepackCache = None,
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
    """Load a server or the engine: TTFT, TPOT, throughput, goodput.

    Example: infopt bench --url http://127.0.0.1:8000 --request-rate 4 --slo ttft=200ms
    """
    from infopt.cli.verb import run_verb
    from infopt.core.errors import UsageError
    from infopt.core.recipe.bench import BenchSettings
    from infopt.core.recipe.serve import EngineSettings

    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    # An option has the name of its setting; device, dtype and seed are common to all verbs.
    own = set(BenchSettings.model_fields) - {"device", "dtype", "seed"}
    given: dict[str, Any] = {k: v for k, v in context.params.items() if k in own}
    asked = [key for key in EngineSettings.model_fields if context.params.get(key) is not None]
    if url is not None and (chosen := [key for key in asked if key != "seed"]):
        option = chosen[0].replace("_", "-")
        raise UsageError(f"--{option} is the server's to choose", "leave it out with --url")
    run_verb("bench", model, given, common, perform, plan)


def perform(work: "Work") -> "Report":
    settings = work.settings
    if settings.url is not None:
        name = work.model if isinstance(work.model, str) else None
        return _over_http(work, settings.url, name)
    if settings.engine is not None:
        from infopt.cli.bench_engine import started

        with started(work) as server:
            report = _over_http(work, server.url, None)
            model = None if settings.engine == "llama.cpp" else work.artifact.summary()
            command = server.foreign_command or " ".join(server.command)
            return report.model_copy(update={"model": model, "engine_command": command})
    _check_in_process(settings)
    from infopt.core.bench.engine_client import EngineClient
    from infopt.core.hardware.native import tell_native
    from infopt.core.runtime.engine import Engine

    tell_native(settings.kernels, settings.device, work.screen.progress)
    client = EngineClient(
        Engine.load(work.artifact, settings), vocab_size=work.artifact.config["vocab_size"]
    )
    report = _through(work, client, "engine")
    return report.model_copy(update={"model": work.artifact.summary()})


def _over_http(work: "Work", url: str, name: str | None) -> "Report":
    from infopt.cli.bench_engine import api_key
    from infopt.core.bench.http_client import HttpClient
    from infopt.core.recipe.bench import CHAT_ONLY, Endpoint

    settings = work.settings
    endpoint: Endpoint = "chat" if settings.chat else "completions"
    if settings.endpoint is None and settings.chat:
        why = "needs it" if settings.workload in CHAT_ONLY else "may hold chats"
        work.screen.note(f"through /v1/chat/completions: workload {settings.workload} {why}")
    client = HttpClient(url, model=name, endpoint=endpoint, api_key=api_key(settings.api_key_env))
    return _through(work, client, url).model_copy(update={"endpoint": endpoint})


def _through(work: "Work", client: Any, target: str) -> "Report":
    """Bench, and lay the requests and tables where the report will lie."""
    from infopt.core.bench.bench import bench as door
    from infopt.core.reports.bench_files import write_files
    from infopt.core.reports.requests import RequestRecord

    records: list[RequestRecord] = []
    report = door(
        client,
        work.settings,
        target=target,
        progress=work.screen.progress,
        keep=records.extend,
    )
    return report if work.output is None else write_files(work.output, report, records)


def _check_in_process(settings: Any) -> None:
    from infopt.core.errors import UsageError

    if settings.needs_server is not None:
        raise UsageError(
            f"{settings.needs_server} is for a server, not for the engine in this process",
            "say --url, or --engine infopt",
        )


def plan(work: "Work") -> "Plan":
    """What the load is; its time is known only once it ran."""
    from infopt.cli.bench_engine import load_actions, serve_settings
    from infopt.core.reports.schema import Plan

    settings = work.settings
    actions = load_actions(settings)
    if settings.url is not None:
        return Plan(
            command="bench",
            actions=(*actions[:-1], f"{actions[-1]}, to {settings.url}"),
            memory_bytes=2 * 10**8,
        )
    if settings.engine == "llama.cpp":
        from dataclasses import replace

        from infopt.cli.serve import plan as plan_of_server

        served = plan_of_server(replace(work, settings=serve_settings(settings)))
        return served.model_copy(
            update={"command": "bench", "actions": (*served.actions, *actions)}
        )
    if settings.engine is None:
        _check_in_process(settings)
    from infopt.core.server.plan import plan_serve

    engine = plan_serve(
        work.artifact, settings if settings.engine is None else serve_settings(settings)
    )
    return Plan(
        command="bench", actions=(*engine.actions, *actions), memory_bytes=engine.memory_bytes
    )
