"""The life of the processes: readiness, signals, deaths, and that nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from infopt.core.artifact.read import read_artifact
from infopt.core.errors import ResourceError, UsageError
from infopt.core.progress import Progress
from infopt.core.recipe.serve import ServeSettings
from infopt.core.server.serve import serve

LONG: Any = {
    "model": "tiny",
    "prompt": [5] * 16,
    "max_tokens": 490,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def folders() -> Callable[[], set[Path]]:
    """The private folders of servers that are there now."""
    return lambda: set(Path(tempfile.gettempdir()).glob("infopt-*/engine.sock"))


def await_true(test: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ready_means_loaded_and_warm(server: Any) -> None:
    assert [line.split()[0] for line in server.lines] == ["loading", "serving"]
    stats = server.health().json()["engine"]
    assert stats["steps"] >= 2, "the warm-up ran"


def test_idle_burns_no_cpu(server: Any) -> None:
    server.await_idle()
    before = server.engine.cpu_times()
    time.sleep(0.5)
    after = server.engine.cpu_times()
    assert (after.user - before.user) + (after.system - before.system) <= 0.05


class Loading(Exception):
    """Raised to go no further."""


def no_further(said: list[Progress]) -> Callable[[Progress], None]:
    def progress(step: Progress) -> None:
        said.append(step)
        if step.stage.startswith("loading"):
            raise Loading

    return progress


def test_a_port_in_use(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is in use"):
            serve(read_artifact(tiny_model), ServeSettings(port=port))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_wider_than_loopback_is_warned_of(tiny_model: Path, host: str) -> None:
    said: list[Progress] = []
    with pytest.raises(Loading):
        serve(read_artifact(tiny_model), ServeSettings(host=host, port=0), no_further(said))
    warned = [step.note for step in said if step.stage == "warning"]
    assert len(warned) == (host == "0.0.0.0") and all("open to other" in note for note in warned)


def test_a_host_that_is_none(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="cannot listen on"):
        serve(read_artifact(tiny_model), ServeSettings(host="no host", port=0))


def test_what_keeps_the_engine_from_loading(tiny_model: Path, folders: Any) -> None:
    before, children = folders(), psutil.Process().children()
    settings = ServeSettings(port=0, max_model_len=100_000)
    with pytest.raises(UsageError, match="max_model_len 100000 is beyond"):
        serve(read_artifact(tiny_model), settings)
    assert folders() == before and psutil.Process().children() == children


def test_a_signal_ends_everything(launch: Any, folders: Any) -> None:
    before = folders()
    server = launch().ready()
    engine = server.engine
    assert len(folders() - before) == 1
    failure: list[openai.APIError] = []

    def stream() -> None:
        with server.client() as client, pytest.raises(openai.APIError) as caught:
            for _ in client.completions.create(stream=True, **LONG):
                pass
        failure.append(caught.value)

    thread = threading.Thread(target=stream)
    thread.start()
    server.await_running()
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 5
    thread.join()
    assert "shutting down" in failure[0].message
    assert not engine.is_running() and folders() == before


def test_a_signal_while_loading(launch: Any, folders: Any) -> None:
    before = folders()
    server = launch()
    server.line("loading")
    await_true(lambda: len(psutil.Process(server.process.pid).children()) == 1)
    engine = server.engine
    assert server.stop() == 0
    assert not engine.is_running() and folders() == before


def test_a_killed_engine_is_told_and_nothing_hangs(launch: Any) -> None:
    server = launch().ready()
    failures: list[Exception] = []

    def ask(stream: bool) -> None:
        with server.client() as client, pytest.raises(openai.APIError) as caught:
            answer = client.completions.create(stream=stream, **LONG)
            list(answer)
        failures.append(caught.value)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    server.await_running(2)
    os.kill(server.engine.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all("killed by signal 9" in str(failure) for failure in failures)
    health = server.health()
    assert health.status_code == 503 and "killed by signal 9" in health.json()["reason"]
    with server.client() as client, pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503
    assert "killed by signal 9" in server.line("engine lost")
    assert server.stop() == 0


def test_a_killed_api_takes_its_engine_along(launch: Any, folders: Any) -> None:
    before = folders()
    server = launch().ready()
    engine = server.engine
    server.process.kill()
    server.process.wait()
    await_true(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    await_true(lambda: folders() == before)


def test_without_the_extra() -> None:
    code = """
import sys
sys.modules["zmq"] = None
from infopt.core.errors import MissingExtraError
try:
    import infopt.core.server.serve
except MissingExtraError as error:
    assert "pip install 'infopt[serve]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
