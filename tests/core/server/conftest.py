"""A real server with a tiny model, started once for all who leave it well; and scripted ones."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Sequence,
)
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
import pytest

from infopt.core.errors import EngineError, UsageError
from infopt.core.runtime.request import FinishReason, SamplingParams, StepOutput
from infopt.core.server.admission import Bounds, Gate
from infopt.core.server.app import Service, create_app
from infopt.core.server.doorway import House
from infopt.core.server.log import RequestLog
from infopt.core.server.metrics import Metrics
from infopt.core.server.prompts import Prompts
from infopt.core.server.supervisor import State

T = TypeVar("T")

# What `infopt serve` does, with the progress as lines.
LAUNCH = """
import sys
from pathlib import Path
from infopt.core.artifact.read import read_artifact
from infopt.core.errors import InfoptError
from infopt.core.recipe.serve import ServeSettings
from infopt.core.server.serve import serve

settings = ServeSettings.model_validate_json(sys.argv[2])
try:
    serve(read_artifact(Path(sys.argv[1])), settings, lambda p: print(p.stage, p.note, flush=True))
except InfoptError as error:
    print("FAILED", type(error).__name__, error, flush=True)
"""


class Server:
    """A server process; `lines` is what it said up to now."""

    def __init__(self, model: Path, **settings: Any) -> None:
        values = {
            "port": 0,
            "kv_blocks": 128,
            "max_model_len": 512,
            "model_name": "tiny",
            "dtype": "float32",
            **settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(model), json.dumps(values)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.lines: list[str] = []

    def line(self, beginning: str) -> str:
        """Read on until a line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith(beginning):
                return line.strip()
        raise AssertionError(f"the server ended without {beginning!r}: {self.lines}")

    def ready(self) -> "Server":
        self.url = self.line("serving").split()[-1]
        return self

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=60)

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=20)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20)

    def post(self, body: Any, path: str = "/v1/completions") -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def await_idle(self, seconds: float = 10) -> dict[str, int]:
        """The engine's counts once nothing runs; fails if blocks stay in use."""
        deadline = time.monotonic() + seconds
        while True:
            stats: dict[str, int] = self.health().json()["engine"]
            if stats["running"] == stats["waiting"] == stats["blocks_used"] == 0:
                return stats
            assert time.monotonic() < deadline, f"still busy: {stats}"
            time.sleep(0.02)

    def await_running(self, count: int = 1) -> None:
        deadline = time.monotonic() + 10
        while self.health().json()["engine"]["running"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, with all that it started; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            assert self.process.stdout is not None
            self.lines += self.process.stdout.read().split("\n")
            self.process.stdout.close()
        return self.process.returncode


@pytest.fixture(scope="package", autouse=True)
def temporary_folder() -> Iterator[Path]:
    """Where servers have their private folders: others may test servers at the same time.

    Its name is short, for sockets.
    """
    with (
        tempfile.TemporaryDirectory(prefix="servers-") as folder,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("TMPDIR", folder)
        m.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(scope="session")
def launch(tiny_model: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of the tiny model; those still running in the end are stopped."""
    started: list[Server] = []

    def start(*, model: Path = tiny_model, **settings: Any) -> Server:
        started.append(Server(model, **settings))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(launch: Callable[..., Server]) -> Iterator[Server]:
    """One for all that leave it as it was; Ctrl-C ends it."""
    running = launch().ready()
    yield running
    assert running.stop(signal.SIGINT) == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """max_retries=0: a failure is a failure."""
    with server.client() as client:
        yield client
    server.await_idle()


class ScriptedEngine:
    """Answers with the texts it is given, one for each of `n` answers, token by token.

    Those who ask for an embedding get the prompt's length in every place.
    """

    def __init__(self, tokenizer: Any, *texts: str, reason: FinishReason = "stop") -> None:
        self.scripts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self.reason = reason
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.given = 0
        self.closed = 0

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        ended: Collection[int] = (),
        **_: Any,
    ) -> AsyncGenerator[StepOutput, None]:
        self.asked.append((list(prompt), params))
        if not prompt:
            raise UsageError("the prompt is empty")
        try:
            if params.pooling is not None:
                vector = tuple([float(len(prompt))] * 4)
                yield StepOutput("x", finish_reason="stop", embedding=vector)
                return
            for index in range(params.n):
                for token in self.scripts[index % len(self.scripts)]:
                    await asyncio.sleep(0)
                    if index in ended:
                        break
                    self.given += 1
                    yield StepOutput("x", (token,), index=index)
                if index not in ended:
                    yield StepOutput("x", finish_reason=self.reason, index=index)
        finally:
            self.closed += 1

    state = State.READY

    async def stats(self, timeout: float) -> dict[str, Any]:
        raise EngineError("there are no counts")


class InProcess:
    """An app with a scripted engine, asked by OpenAI's client and a plain one."""

    def __init__(self, tokenizer: Any, *texts: str, reason: FinishReason = "stop", **settings: Any):
        self.tokenizer = tokenizer
        self.engine = ScriptedEngine(tokenizer, *texts, reason=reason)
        prompts = Prompts(tokenizer, vocab_size=len(tokenizer), max_model_len=2048)
        house = House(Gate(Bounds(4096, 10**6)), Metrics("tiny"), RequestLog())
        self.service = Service(self.engine, prompts, "tiny", 4, house, **settings)

    def run(
        self, test: Callable[[openai.AsyncOpenAI, httpx.AsyncClient], Coroutine[Any, Any, T]]
    ) -> T:
        try:
            return asyncio.run(self._run(test))
        finally:
            self.service.prompts.close()

    async def _run(
        self, test: Callable[[openai.AsyncOpenAI, httpx.AsyncClient], Coroutine[Any, Any, T]]
    ) -> T:
        app = create_app(self.service)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as plain:
            client = openai.AsyncOpenAI(
                base_url="http://app/v1", api_key="-", max_retries=0, http_client=plain
            )
            async with asyncio.timeout(60):
                return await test(client, plain)


@pytest.fixture(scope="session")
def tokenizer(default_artifact: Any) -> Any:
    return default_artifact.tokenizer()


@pytest.fixture(scope="session")
def in_process(tokenizer: Any) -> Callable[..., InProcess]:
    """Make an app whose engine says the texts that it is given."""
    return partial(InProcess, tokenizer)
