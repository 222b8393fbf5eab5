"""`infopt serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


def serve(
    model: opt.Model = None,
    engine: Annotated[
        opt.EngineWord | None,
        typer.Option(
            "--engine",
            help="Whose server is started; the others' options are mapped, and shown.",
            show_default="infopt",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port; 0 takes a free one.", show_default="8000")
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name", help="The name that clients ask for.", show_default="the artifact's"
        ),
    ] = None,
    tool_parser: opt.ToolParser = None,
    pooling: opt.Pooling = None,
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
    api_key_file: Annotated[
        str | None,
        typer.Option(
            "--api-key-file",
            help="API keys, one a line; without it those of INFOPT_API_KEYS.",
            show_default="none: all may ask",
            metavar="FILE",
        ),
    ] = None,
    max_queued_requests: Annotated[
        int | None,
        typer.Option(
            "--max-queued-requests",
            help="Prompts that may wait for the engine; more get 429.",
            show_default="512",
        ),
    ] = None,
    max_queued_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-queued-tokens", help="Their tokens.", show_default="4 times the KV cache"
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-body-bytes", help="Of a request; larger ones get 413.", show_default="16 MiB"
        ),
    ] = None,
    rate_limit: Annotated[
        float | None,
        typer.Option(
            "--rate-limit",
            help="Requests a minute of one client; more get 429.",
            show_default="any",
            metavar="PER_MINUTE",
        ),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            "--max-concurrency", help="Requests of one client at a time.", show_default="any"
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            "--request-timeout",
            help="After which a request is ended.",
            show_default="600",
            metavar="SECONDS",
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            "--drain-timeout",
            help="Requests have to end after a first signal.",
            show_default="30",
            metavar="SECONDS",
        ),
    ] = None,
    max_idle: Annotated[
        float | None,
        typer.Option(
            "--max-idle",
            help="Without requests until the engine's memory is given back.",
            show_default="never",
            metavar="SECONDS",
        ),
    ] = None,
    log_file: Annotated[
        str | None,
        typer.Option(
            "--log-file",
            help="A line of JSON for each request; - is the standard error.",
            show_default="none",
            metavar="FILE",
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            "--otlp-endpoint",
            help="Send each request's spans to this OpenTelemetry collector.",
            show_default="none",
            metavar="URL",
        ),
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option(
            "--tls-cert",
            help="Certificate chain in PEM: HTTPS.",
            show_default="HTTP",
            metavar="FILE",
        ),
    ] = None,
    tls_key: Annotated[
        str | None,
        typer.Option("--tls-key", help="Its private key.", show_default="none", metavar="FILE"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="Pages from there may ask (repeatable); * is any."),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask", help="Start, ask this as a chat, print the answer, stop (repeatable)."
        ),
    ] = None,
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
    """Serve a model to OpenAI clients, continuously batched.

    Example: infopt serve smol-w4 --port 8000
    """
    given: dict[str, Any] = {
        "engine": engine,
        "host": host,
        "port": port,
        "model_name": model_name,
        "tool_parser": tool_parser,
        "pooling": pooling,
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
        "threads": threads,
        "kernels": kernels,
        "activations": activations,
        "repack_cache": repack_cache,
        "api_key_file": api_key_file,
        "max_queued_requests": max_queued_requests,
        "max_queued_tokens": max_queued_tokens,
        "max_body_bytes": max_body_bytes,
        "rate_limit": rate_limit,
        "max_concurrency": max_concurrency,
        "request_timeout": request_timeout,
        "drain_timeout": drain_timeout,
        "max_idle": max_idle,
        "log_file": log_file,
        "otlp_endpoint": otlp_endpoint,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "cors_origins": tuple(cors_origin) if cors_origin else None,
        "ask": tuple(ask) if ask else None,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    _serve(model, given, common)


def _serve(model: str | None, given: dict[str, Any], common: opt.Common) -> None:
    from infopt.cli.screen import Screen
    from infopt.cli.verb import Work, opener, run_verb, settings_for
    from infopt.core.errors import UsageError
    from infopt.core.recipe.serve import ServeSettings

    settings, step = settings_for("serve", common, given)
    assert isinstance(settings, ServeSettings)
    if common.dry_run or settings.ask:
        run_verb("serve", model, given, common, _ask, plan)
        return
    if common.json is not None or common.output is not None:
        raise UsageError(
            "serve has no report to write", "--json and --output go with --ask or --dry-run"
        )
    with Screen(quiet=common.quiet) as screen:
        open_model = opener(screen, common)
        word = model if model is not None else (step.model if step else None)
        work = Work("serve", word, settings, None, False, False, screen, open_model)
        if settings.engine == "llama.cpp":
            from infopt.cli.serving import gguf_file
            from infopt.core.server.foreign_life import serve_file

            serve_file(gguf_file(word), settings, screen.progress)
            return
        if settings.engine != "infopt":
            from infopt.core.server.foreign_life import serve_foreign

            serve_foreign(work.artifact, settings, screen.progress)
            return
        from infopt.core.server.serve import serve as door

        def reload() -> ServeSettings:
            fresh, _ = settings_for("serve", common, given)
            assert isinstance(fresh, ServeSettings)
            return fresh

        door(work.artifact, work.settings, screen.progress, reload)


def _ask(work: "Work") -> "Report":
    from infopt.core.errors import UsageError

    if work.settings.engine == "llama.cpp":
        raise UsageError("--ask is not for --engine llama.cpp", "leave out --ask, or use --url")
    from tempfile import TemporaryDirectory

    from infopt.cli.serving import Server, ask_all

    with (
        TemporaryDirectory(prefix="infopt-serve-") as folder,
        Server(work.artifact, work.settings, Path(folder) / "serve.log") as server,
    ):
        return ask_all(server, work.artifact, work.settings)


def plan(work: "Work") -> "Plan":
    from infopt.core.server.plan import plan_serve

    if work.settings.engine == "llama.cpp":
        return _plan_of_a_file(work)
    return plan_serve(work.artifact, work.settings)


def _plan_of_a_file(work: "Work") -> "Plan":
    """llama.cpp reads its own file; infopt does not open it."""
    from infopt.cli.serving import gguf_file
    from infopt.core.reports.schema import Plan
    from infopt.core.server.foreign import foreign_command

    word = work.model if work.model is None or isinstance(work.model, str) else work.model.path
    file = gguf_file(word)
    command = " ".join(foreign_command("llama.cpp", str(file), work.settings))
    return Plan(command="serve", actions=(f"run {command}",), memory_bytes=file.stat().st_size)
