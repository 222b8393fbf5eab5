"""What `infopt bench` needs around its load: a server of its own, a key, a plan in words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from infopt.core.errors import UsageError
from infopt.core.recipe.base import validated
from infopt.core.recipe.bench import API_KEY_VARIABLE, CONCURRENCY, REQUESTS, BenchSettings
from infopt.core.recipe.serve import EngineSettings, ServeSettings

if TYPE_CHECKING:
    from infopt.cli.serving import Server
    from infopt.cli.verb import Work


@contextmanager
def started(work: "Work") -> "Iterator[Server]":
    """The server that the settings name, as a process of its own, for as long as the load."""
    from infopt.cli.serving import GgufFile, Server, gguf_file

    settings: BenchSettings = work.settings
    named = work.model if isinstance(work.model, str) else None
    with TemporaryDirectory(prefix="infopt-bench-") as folder:
        log = Path(folder) / "serve.log"
        served = GgufFile(gguf_file(named)) if settings.engine == "llama.cpp" else work.artifact
        with Server(served, serve_settings(settings), log) as server:
            work.screen.note(f"started: {server.foreign_command or ' '.join(server.command)}")
            yield server


def serve_settings(settings: BenchSettings) -> ServeSettings:
    """The same engine's settings, for a server on a free port."""
    engine = {key: getattr(settings, key) for key in EngineSettings.model_fields}
    return validated(
        ServeSettings, {**engine, "engine": settings.engine, "port": 0}, "the command line"
    )


def api_key(variable: str | None) -> str | None:
    """The key in the environment; raises UsageError, without the key, for one of no use."""
    name = variable or API_KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if variable is not None and not key:
        raise UsageError(
            f"--api-key-env {name}: the environment has no such variable",
            f"export {name} with the server's key",
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{name} holds no API key: a key is of printable ASCII characters")
    return key or None


def load_actions(settings: BenchSettings) -> tuple[str, ...]:
    """What would be sent, in words."""
    lengths = f"{_words(settings.prompt_range)} tokens in and {_words(settings.output_range)} out"
    asked = f"workload {settings.workload}, {lengths} each"
    if settings.trace is not None:
        return (f"replay the requests of {settings.trace}",)
    if settings.find_capacity:
        return (f"search the highest request rate that keeps {settings.slo}: {asked}",)
    count = f"{settings.requests or REQUESTS} requests"
    if settings.duration is not None:
        count = f"requests for {settings.duration:g} s"
    if settings.sweep is not None:
        return (f"send {count} at each level of {settings.sweep}: {asked}",)
    if settings.request_rate is not None:
        return (f"send {count}, {settings.request_rate:g} a second: {asked}",)
    return (f"send {count}, {settings.concurrency or CONCURRENCY} at once: {asked}",)


def _words(found: tuple[int, int]) -> str:
    return str(found[0]) if found[0] == found[1] else f"{found[0]} to {found[1]}"
