"""One engine process from its start to its end: nothing of it is left behind."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import zmq
import zmq.asyncio

from infopt.core.artifact.read import Artifact
from infopt.core.errors import EngineError
from infopt.core.recipe.serve import EngineSettings
from infopt.core.server.engine_client import EngineClient

STOP_SECONDS = 5.0
SAVE_SECONDS = 60.0
"""What an engine may take to put its prefixes on disk."""


@asynccontextmanager
async def engine(
    artifact: Artifact, settings: EngineSettings, *, on_death: Callable[[EngineError], None]
) -> AsyncIterator[EngineClient]:
    """Yield a client of a loaded engine in its own process, which is gone when the block is left.

    Raises what the engine raised while loading. If it dies later, requests get an EngineError and
    `on_death` is called; where the block is left in order, the engine ends in order too.
    """
    # 0700: ours alone. The engine removes it where it sees that this process was killed.
    with tempfile.TemporaryDirectory(prefix="infopt-", ignore_cleanup_errors=True) as folder:
        address = f"ipc://{folder}/engine.sock"
        context = zmq.asyncio.Context()
        channel = context.socket(zmq.DEALER)
        channel.setsockopt(zmq.SNDHWM, 0)
        channel.setsockopt(zmq.LINGER, 0)
        channel.bind(address)
        try:
            client = EngineClient(channel)
            process = await _start(_orders(artifact, settings, address))
            try:
                async with _task(client.run()), _task(_watch(process, client, on_death)):
                    await client.limits
                    yield client
                    client.fail(EngineError("the engine is stopped"))
                    await client.stop()
                    patience = STOP_SECONDS if settings.prefix_disk is None else SAVE_SECONDS
                    with suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), patience)
            finally:
                await _stop(process)
        finally:
            channel.close()
            context.term()


def _orders(artifact: Artifact, settings: EngineSettings, address: str) -> dict[str, Any]:
    values = settings.model_dump(mode="json", include=set(EngineSettings.model_fields))
    return {
        "artifact": str(artifact.path.resolve()),
        "name": artifact.name,
        "trust_remote_code": artifact.trust_remote_code,
        "settings": values,
        "address": address,
    }


async def _start(orders: dict[str, Any]) -> asyncio.subprocess.Process:
    # -P: no module of the working folder may take the place of a real one.
    # A session of its own: Ctrl-C reaches this process only, which then ends the engine in order.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "infopt.core.server.engine_process"),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(orders).encode() + b"\n")
    return process


async def _watch(
    process: asyncio.subprocess.Process,
    client: EngineClient,
    on_death: Callable[[EngineError], None],
) -> None:
    status = await process.wait()
    await asyncio.sleep(0.1)  # its last words may still be in the socket
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    loaded = client.limits.done()
    said = f": {client.failure.message}" if client.failure else ""
    death = EngineError(f"the engine process ended ({how}){said}")
    client.fail(death)
    if loaded:
        on_death(death)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Close its stdin, which ends it; kill it if it does not end; reap it in any case."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except BaseException as error:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if not isinstance(error, TimeoutError):
            raise


@asynccontextmanager
async def _task(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run beside the block, and not beyond it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
