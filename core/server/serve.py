"""The door: an API process with its engine process, until a signal ends both."""

import asyncio
import errno
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec

from infopt.core.artifact.read import Artifact
from infopt.core.errors import (
    InfoptError,
    MissingExtraError,
    ResourceError,
    UsageError,
)
from infopt.core.hardware.native import tell_native
from infopt.core.models.config import ModelConfig
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.serve import ServeSettings
from infopt.core.runtime.request import SamplingParams

_PACKAGES = ("fastapi", "msgpack", "prometheus_client", "starlette", "uvicorn", "zmq")

try:
    import uvicorn
    from starlette.types import ASGIApp

    from infopt.core.server.admission import Bounds, Gate
    from infopt.core.server.doorway import House, Tracing
    from infopt.core.server.engine_life import engine
    from infopt.core.server.keys import read_keys
    from infopt.core.server.life import Stop, drained, slumber, stop_signals
    from infopt.core.server.log import RequestLog
    from infopt.core.server.messages import Limits
    from infopt.core.server.metrics import Metrics
    from infopt.core.server.supervisor import Supervisor
except ModuleNotFoundError as missing:
    if missing.name not in _PACKAGES:
        raise
    raise MissingExtraError(missing.name, "serve") from missing
if find_spec("fastapi") is None:  # imported while the engine loads
    raise MissingExtraError("fastapi", "serve")

BACKLOG = 2048
GRACE_SECONDS = 5
"""What requests that were cut off have to hear of it."""
WARMUP_TOKENS = 2
CACHES_QUEUED = 4
"""How often prompts that wait could fill the KV cache, where nothing else is said."""

Reload = Callable[[], ServeSettings]
"""The settings as they are said now: in the recipe, and on the command line."""


def serve(
    artifact: Artifact,
    settings: ServeSettings,
    progress: ProgressCallback = silent,
    reload: Reload | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; progress says 'listening on URL' once a first answer was made.

    After a first signal requests in flight may end, after a second one they are cut off. On SIGHUP
    keys and limits are read again. Raises ResourceError if the port is taken, whatever kept the
    engine from loading, and EngineError once it died too often to be started again.
    """
    keys = read_keys(settings.api_key_file)
    _check_tls(settings)
    log = RequestLog.open(settings.log_file)
    model = settings.model_name or artifact.name
    tracing = _tracing(settings, model, progress)
    with _bound(settings.host, settings.port) as listener:
        if not _is_loopback(listener) and keys is None:
            progress(
                Progress(
                    "warning",
                    note=f"{settings.host} is open to other machines, and there are no API keys: "
                    "whoever reaches the port can use the model",
                )
            )
        tell_native(settings.kernels, settings.device, progress)
        cache = {"block_size": str(settings.block_size), "kv_dtype": settings.kv_dtype}
        gate = Gate(_bounds(settings, None))
        house = House(gate, Metrics(model, cache), log, tracing, keys)
        _set_limits(house, settings)
        with suppress(asyncio.CancelledError):  # a signal while loading
            asyncio.run(_serve(artifact, settings, listener, house, progress, reload))
    if tracing is not None:
        tracing.close()
    log.close()


async def _serve(
    artifact: Artifact,
    settings: ServeSettings,
    listener: socket.socket,
    house: House,
    progress: ProgressCallback,
    reload: Reload | None,
) -> None:
    progress(Progress("loading the engine", note=artifact.name))
    with stop_signals() as stop:
        # Meanwhile: both take as long as a good part of an engine.
        tokenizer = asyncio.create_task(asyncio.to_thread(artifact.text_tokenizer))
        routes = asyncio.create_task(asyncio.to_thread(import_module, "infopt.core.server.app"))
        async with _supervised(artifact, settings, house, stop, progress) as supervisor:
            limits = await supervisor.limits
            await _warm_up(supervisor, limits.max_model_len)
            await routes
            from infopt.core.server.app import Service, create_app
            from infopt.core.server.prompts import Prompts

            config = ModelConfig.from_hf(artifact.config)
            prompts = Prompts(
                await tokenizer,
                vocab_size=config.vocab_size,
                max_model_len=limits.max_model_len,
            )
            house.gate.bounds = _bounds(settings, limits)
            stop.on_hangup(lambda: _reload(house, settings, limits, progress, reload))
            service = Service(
                supervisor,
                prompts,
                settings.model_name or artifact.name,
                config.embedding_size,
                house,
                tool_parser=settings.tool_parser,
                pooling=settings.pooling,
            )
            app = create_app(service, settings.cors_origins)
            try:
                await _listen(app, listener, settings, supervisor, house, stop, progress)
            finally:
                prompts.close()


class _Told:
    """Tells of the engine's life: on the screen, in the log, and in the metrics."""

    def __init__(self, house: House, progress: ProgressCallback) -> None:
        self._house, self._progress = house, progress

    def lost(self, death: InfoptError, pause: float | None) -> None:
        then = "it is not started again" if pause is None else f"the next one starts in {pause:g} s"
        self._house.metrics.engine.lost()
        self._tell("engine lost", f"{death.message}; requests get 503; {then}")

    def back(self) -> None:
        self._house.metrics.engine.restarts += 1
        self._tell("engine back", "requests are answered again")

    def slept(self) -> None:
        self._house.metrics.engine.lost()
        self._tell("engine asleep", "nobody asked for a while; the next request wakes it")

    def _tell(self, stage: str, note: str) -> None:
        self._house.log.event(stage, note)
        self._progress(Progress(stage, note=note))


@asynccontextmanager
async def _supervised(
    artifact: Artifact,
    settings: ServeSettings,
    house: House,
    stop: Stop,
    progress: ProgressCallback,
) -> AsyncIterator[Supervisor]:
    """An engine that is kept alive, and ends in order: a further signal ends it at once."""
    supervisor = Supervisor(
        lambda died: engine(artifact, settings, on_death=died), _Told(house, progress)
    )
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
        supervisor.stop()
        pressed = asyncio.create_task(stop.pressed.wait())
        await asyncio.wait({running, pressed}, return_when=asyncio.FIRST_COMPLETED)
        pressed.cancel()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _warm_up(engine: Supervisor, max_model_len: int) -> None:
    """One short answer, so that the first client does not wait for what is done only once."""
    tokens = min(WARMUP_TOKENS, max_model_len - 1)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async for _ in engine.generate([0], params):
        pass


def _tracing(settings: ServeSettings, model: str, progress: ProgressCallback) -> Tracing | None:
    """Raises MissingExtraError, and UsageError for an address that is none."""
    if settings.otlp_endpoint is None:
        return None
    from infopt.core.server.tracing import exporting  # a package of an extra of its own

    return exporting(
        settings.otlp_endpoint, model, lambda note: progress(Progress("warning", note=note))
    )


def _bounds(settings: ServeSettings, limits: Limits | None) -> Bounds:
    by_cache = 0 if limits is None else CACHES_QUEUED * limits.cache_tokens
    return Bounds(
        settings.max_queued_requests,
        settings.max_queued_tokens or by_cache,
        settings.rate_limit,
        settings.max_concurrency,
    )


def _set_limits(house: House, settings: ServeSettings) -> None:
    house.max_body_bytes = settings.max_body_bytes
    house.request_timeout = settings.request_timeout


def _reload(
    house: House,
    settings: ServeSettings,
    limits: Limits,
    progress: ProgressCallback,
    reload: Reload | None,
) -> None:
    """Keys and limits as they are now; what cannot be read changes nothing."""
    try:
        fresh = settings if reload is None else reload()
        keys = read_keys(fresh.api_key_file)
    except InfoptError as error:
        note = f"nothing was reloaded: {error.message}"
        progress(Progress("warning", note=note))
    else:
        house.keys = keys
        house.gate.bounds = _bounds(fresh, limits)
        _set_limits(house, fresh)
        count = "no API keys" if keys is None else f"{len(keys)} API keys"
        note = f"{count}, and the limits of requests, were read again"
        progress(Progress("reloaded", note=note))
    house.log.event("reload", note)


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: the engine has to end in order before the process does."""
        yield


async def _listen(
    app: ASGIApp,
    listener: socket.socket,
    settings: ServeSettings,
    supervisor: Supervisor,
    house: House,
    stop: Stop,
    progress: ProgressCallback,
) -> None:
    """Answer until a signal; then let those inside end, within the time there is for it."""
    server = _Uvicorn(_uvicorn_config(app, settings))
    with _port_faults(listener.getsockname()[1]):
        listener.listen(BACKLOG)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.create_task(stop.asked.wait())
    idle = asyncio.create_task(slumber(supervisor, house, settings.max_idle))
    url = _url(listener, tls=settings.tls_cert is not None)
    house.log.event("serving", f"listening on {url}")
    progress(Progress("serving", note=f"listening on {url}"))
    over: set[asyncio.Future[object]] = {serving, asked, supervisor.over}  # type: ignore[arg-type]
    await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
    progress(Progress("stopping", note=f"{house.working} requests in flight"))
    house.log.event("stopping", f"{house.working} requests in flight")
    for task in (asked, idle):
        task.cancel()
    if not supervisor.over.done():
        await drained(house, settings.drain_timeout, stop)
    server.should_exit = True
    await serving
    if supervisor.over.done():
        raise supervisor.over.result()


def _uvicorn_config(app: ASGIApp, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def _check_tls(settings: ServeSettings) -> None:
    """Raise UsageError for a certificate or key that is none, before anything is loaded."""
    if settings.tls_cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cannot use the certificate {settings.tls_cert} with the key {settings.tls_key}: "
            f"{error.strerror or error}"
        ) from error


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket that does not listen yet: clients are refused until there is an engine."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"cannot listen on {host!r}: {error.strerror}") from error
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _port_faults(port):
            listener.bind(address)
        yield listener


@contextmanager
def _port_faults(port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} is in use", "choose another with --port; 0 takes a free one"
            ) from error
        raise ResourceError(f"cannot listen on port {port}: {error.strerror}") from error


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def _url(listener: socket.socket, *, tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
