"""The life of the processes: readiness, signals, deaths, and that nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
def folders(temporary_folder: Path) -> Callable[[], set[Path]]:
    """The private folders of servers that are there now."""
    return lambda: set(temporary_folder.glob("infopt-*/engine.sock"))


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


def test_a_certificate_that_is_none_is_told_before_anything_is_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "cert.pem").write_text("none")
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    said: list[Progress] = []
    with pytest.raises(UsageError, match="cannot use the certificate"):
        serve(read_artifact(tiny_model), ServeSettings(port=0, **files), no_further(said))  # type: ignore[arg-type]
    assert said == []


def test_what_keeps_the_engine_from_loading(tiny_model: Path, folders: Any) -> None:
    before, children = folders(), psutil.Process().children()
    settings = ServeSettings(port=0, max_model_len=100_000)
    with pytest.raises(UsageError, match="max_model_len 100000 is beyond"):
        serve(read_artifact(tiny_model), settings)
    assert folders() == before and psutil.Process().children() == children


def test_a_signal_ends_everything(launch: Any, folders: Any) -> None:
    before = folders()
    server = launch(drain_timeout=0.0).ready()
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


def test_a_signal_lets_those_inside_end_and_nobody_else_in(launch: Any) -> None:
    server = launch().ready()
    found: list[Any] = []

    def ask(stream: bool) -> None:
        with server.client() as client:
            answer: Any = client.completions.create(stream=stream, **LONG)
            found.append(sum(1 for _ in answer) if stream else answer.usage.completion_tokens)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False, True)]
    for thread in threads:
        thread.start()
    server.await_running(3)
    server.process.send_signal(signal.SIGTERM)
    server.line("stopping")
    assert server.get("/ready").status_code == 503
    assert server.health().json()["status"] == "draining"
    refused = server.post({"model": "tiny", "prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    for thread in threads:
        thread.join()
    assert 490 in found and min(found) > 1 and len(found) == 3
    server.process.wait(10)
    assert server.process.returncode == 0


def test_who_is_left_when_the_time_to_drain_is_over_is_told(launch: Any) -> None:
    server = launch(drain_timeout=0.3).ready()
    failure: list[openai.APIError] = []

    def stream() -> None:
        body = {**LONG, "n": 64, "stream": True}
        with server.client() as client, pytest.raises(openai.APIError) as caught:
            list(client.completions.create(**body))
        failure.append(caught.value)

    thread = threading.Thread(target=stream)
    thread.start()
    server.await_running()
    began = time.monotonic()
    assert server.stop() == 0
    assert 0.3 <= time.monotonic() - began < 5
    thread.join()
    assert failure[0].body == {
        "message": "the server is shutting down",
        "type": "engine_error",
        "param": None,
        "code": "shutting_down",
    }


def test_a_second_signal_does_not_wait(launch: Any) -> None:
    server = launch().ready()

    def stream() -> None:
        body = {**LONG, "n": 64, "stream": True}
        with server.client() as client, suppress(openai.APIError):
            list(client.completions.create(**body))

    thread = threading.Thread(target=stream)
    thread.start()
    server.await_running()
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    server.line("stopping")
    assert server.stop() == 0
    assert time.monotonic() - began < 5
    thread.join()


def test_an_idle_engine_gives_its_memory_back_and_is_woken(launch: Any) -> None:
    server = launch(max_idle=0.4).ready()
    first = server.engine
    server.line("engine asleep")
    await_true(lambda: not first.is_running())
    assert psutil.Process(server.process.pid).children() == []
    assert server.health().json() == {"status": "asleep"}
    assert server.get("/ready").json() == {"status": "asleep"}
    assert "infopt:engine_up{" in server.get("/metrics").text
    with server.client() as client:
        assert client.completions.create(model="tiny", prompt="a").choices
    assert server.engine.pid != first.pid
    assert server.stop() == 0


def test_prefixes_are_on_disk_when_the_server_has_ended(launch: Any, tmp_path: Path) -> None:
    hits = []
    for _ in range(2):
        server = launch(prefix_disk=str(tmp_path / "prefixes")).ready()
        assert server.post({"model": "tiny", "prompt": [7] * 80, "max_tokens": 1}).is_success
        hits.append(server.health().json()["engine"]["prefix_hits"])
        assert server.stop() == 0
    assert hits[0] == 0 and hits[1] >= 64


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
    assert "killed by signal 9" in server.line("engine lost")
    health = server.health()
    assert health.status_code == 503 and "killed by signal 9" in health.json()["reason"]
    assert server.get("/ready").status_code == 503
    with server.client() as client, pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    server.line("engine back")
    with server.client() as client:
        assert client.completions.create(model="tiny", prompt="a").choices
    assert server.await_idle()["blocks_used"] == 0
    assert 'infopt:engine_restarts_total{model_name="tiny"} 1.0' in server.get("/metrics").text
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
