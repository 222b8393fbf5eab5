"""Another engine's server as a child process: started, awaited, ended in order."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from infopt.core.artifact.read import Artifact
from infopt.core.errors import EngineError, UsageError
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.serve import KEYS_VARIABLE, ServeSettings
from infopt.core.server.foreign import foreign_command

_LOOK_S = 0.5
_INSTALL = {"llama-server": "build or install llama.cpp, and put llama-server on the PATH"}
_ASK_S = 5.0
KILL_SECONDS = 60.0
"""After its own time to drain, what does not end is killed."""


def serve_foreign(
    artifact: Artifact, settings: ServeSettings, progress: ProgressCallback = silent
) -> None:
    """Serve by the engine that the settings name, until SIGINT or SIGTERM.

    Raises UsageError for a setting, or API keys, that it does not have, EngineError where it is not
    installed or ends by itself.
    """
    trust = artifact.trust_remote_code
    serve_file(artifact.path, settings, progress, trust_remote_code=trust)


def serve_file(
    model: Path,
    settings: ServeSettings,
    progress: ProgressCallback = silent,
    *,
    trust_remote_code: bool = False,
) -> None:
    """The same for a model that infopt need not read: a folder, or llama.cpp's GGUF file."""
    if os.environ.get(KEYS_VARIABLE):
        raise UsageError(
            f"{KEYS_VARIABLE} is not known to {settings.engine}, which would let anybody in",
            "unset it, or serve with --engine infopt",
        )
    if settings.port == 0:
        settings = settings.model_copy(update={"port": free_port(settings.host)})
    command = foreign_command(
        settings.engine,
        str(model),
        settings,
        trust_remote_code=trust_remote_code,
    )
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    run_foreign(
        command,
        url=f"{scheme}://{host}:{settings.port}",
        drain_s=settings.drain_timeout,
        progress=progress,
    )


def run_foreign(
    command: Sequence[str],
    *,
    url: str,
    drain_s: float,
    progress: ProgressCallback,
) -> None:
    """Run the command until a signal; progress says 'listening on URL' once it answers.

    What it prints goes where our own output goes. Raises EngineError where its program is not
    installed, or ends by itself.
    """
    asyncio.run(_run(_found(command), url, drain_s, progress))


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.create_server((host, 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def _found(command: Sequence[str]) -> list[str]:
    """With the program's whole path: beside our own Python first."""
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.exists() else shutil.which(command[0])
    if program is None:
        hint = _INSTALL.get(command[0], f"pip install {command[0]}")
        raise EngineError(f"there is no program {command[0]!r}", hint)
    if "sglang.launch_server" in command and find_spec("sglang") is None:
        raise EngineError("the package 'sglang' is not installed", "pip install sglang")
    return [program, *command[1:]]


async def _run(command: list[str], url: str, drain_s: float, progress: ProgressCallback) -> None:
    progress(Progress("starting", note=" ".join(command)))
    process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    ended = asyncio.create_task(process.wait())
    asked = asyncio.create_task(stop.wait())
    up = asyncio.create_task(_answers(f"{url}/health"))
    try:
        await asyncio.wait({ended, asked, up}, return_when=asyncio.FIRST_COMPLETED)
        if up.done() and not ended.done():
            progress(Progress("serving", note=f"listening on {url}"))
            await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise EngineError(f"{Path(command[0]).name} ended with exit code {ended.result()}")
        progress(Progress("stopping"))
    finally:
        for task in (asked, up):
            task.cancel()
        await _end(process, drain_s + KILL_SECONDS)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _end(process: asyncio.subprocess.Process, patience: float) -> None:
    """SIGTERM to all of it, SIGKILL to what is left."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), patience)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _answers(url: str) -> None:
    """Return once the URL answers 200."""
    while True:
        try:
            if await asyncio.to_thread(_status, url) == 200:
                return
        except (OSError, urllib.error.URLError):
            pass
        await asyncio.sleep(_LOOK_S)


def _status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=_ASK_S) as answer:
        status: int = answer.status
        return status
