"""The door: an API process with its engine process, until a signal ends both."""

import asyncio
import errno
import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from infopt.core.artifact.read import Artifact
from infopt.core.errors import EngineError, MissingExtraError, ResourceError, UsageError
from infopt.core.models.config import ModelConfig
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.serve import ServeSettings
from infopt.core.runtime.request import SamplingParams

try:
    import uvicorn
    from fastapi import FastAPI

    from infopt.core.server.app import Service, create_app
    from infopt.core.server.engine_client import EngineClient
    from infopt.core.server.prompts import Prompts
    from infopt.core.server.supervisor import engine
except ModuleNotFoundError as missing:
    if missing.name not in ("fastapi", "msgpack", "starlette", "uvicorn", "zmq"):
        raise
    raise MissingExtraError(missing.name, "serve") from missing

BACKLOG = 2048
GRACE_SECONDS = 5
"""After a signal, requests in flight are told of the end; this long they have to hear it."""
WARMUP_TOKENS = 2


def serve(artifact: Artifact, settings: ServeSettings, progress: ProgressCallback = silent) -> None:
    """Serve until SIGINT or SIGTERM; progress says 'listening on URL' once a first answer was made.

    Raises ResourceError if the port is taken, and whatever kept the engine from loading. An engine
    that dies later ends its requests with an error; /health and all requests get 503 from then on.
    """
    with _bound(settings.host, settings.port) as listener:
        if not _is_loopback(listener):
            progress(
                Progress(
                    "warning",
                    note=f"{settings.host} is open to other machines, and there are no API keys: "
                    "whoever reaches the port can use the model",
                )
            )
        with suppress(asyncio.CancelledError):  # a signal while loading
            asyncio.run(_serve(artifact, settings, listener, progress))


async def _serve(
    artifact: Artifact,
    settings: ServeSettings,
    listener: socket.socket,
    progress: ProgressCallback,
) -> None:
    def told(death: EngineError) -> None:
        progress(Progress("engine lost", note=f"{death.message}; requests get 503 from now on"))

    progress(Progress("loading the engine", note=artifact.name))
    with _stop_signals() as stop:
        tokenizer = asyncio.create_task(asyncio.to_thread(artifact.tokenizer))  # meanwhile
        async with engine(artifact, settings, on_death=told) as client:
            limits = await client.limits
            await _warm_up(client, limits.max_model_len)
            config = ModelConfig.from_hf(artifact.config)
            prompts = Prompts(
                await tokenizer,
                vocab_size=config.vocab_size,
                max_model_len=limits.max_model_len,
            )
            service = Service(
                client,
                prompts,
                settings.model_name or artifact.name,
                config.embedding_size,
                tool_parser=settings.tool_parser,
                pooling=settings.pooling,
            )
            app = create_app(service)
            try:
                await _listen(app, listener, client, stop, progress)
            finally:
                prompts.close()


class _Stop:
    """The first signal ends the loading, or asks the server to stop; the next one presses it."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self.server: uvicorn.Server | None = None
        self.asked = asyncio.Event()

    def signal(self) -> None:
        if self.server is None:
            self._task.cancel()
        else:
            self.server.force_exit = self.asked.is_set()
            self.asked.set()


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    task = asyncio.current_task()
    assert task is not None
    stop, loop = _Stop(task), asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop.signal)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _warm_up(client: EngineClient, max_model_len: int) -> None:
    """One short answer, so that the first client does not wait for what is done only once."""
    tokens = min(WARMUP_TOKENS, max_model_len - 1)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async for _ in client.generate([0], params):
        pass


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: the engine has to end in order before the process does."""
        yield


async def _listen(
    app: FastAPI,
    listener: socket.socket,
    client: EngineClient,
    stop: _Stop,
    progress: ProgressCallback,
) -> None:
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = stop.server = _Uvicorn(config)
    with _port_faults(listener.getsockname()[1]):
        listener.listen(BACKLOG)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.create_task(stop.asked.wait())
    progress(Progress("serving", note=f"listening on {_url(listener)}"))
    await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
    progress(Progress("stopping"))
    asked.cancel()
    client.fail(EngineError("the server is shutting down"))
    server.should_exit = True
    await serving


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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
