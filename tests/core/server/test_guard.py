"""Keys, bounds, deadlines, logs and metrics: one real server that has them all."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

KEYS = (
    "sk-alice-123 name=alice\nsk-bob-45678 name=bob concurrency=1\nsk-carol-99 name=carol rate=2\n"
)
LONG: Any = {"model": "tiny", "prompt": [5] * 16, "max_tokens": 400, "ignore_eos": True}
SHORT: Any = {"model": "tiny", "prompt": "The sea", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    (folder / "keys").write_text(KEYS)
    return folder


@pytest.fixture(scope="module")
def guarded(launch: Callable[..., Any], files: Path) -> Iterator[Any]:
    server = launch(
        api_key_file=str(files / "keys"),
        max_queued_requests=2,
        max_queued_tokens=600,
        max_running=2,
        max_body_bytes=20_000,
        log_file=str(files / "log"),
        cors_origins=["https://page.example"],
    ).ready()
    yield server
    assert server.stop() == 0
    assert "sk-" not in (files / "log").read_text() + "\n".join(server.lines)


def ask(server: Any, body: Any, key: str | None = "sk-alice-123", **headers: str) -> httpx.Response:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


def code(response: httpx.Response) -> str:
    found: str = response.json()["error"]["code"]
    return found


def metrics(server: Any) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=20).text
    return {
        sample.name
        + "".join(
            f" {v}" for k, v in sorted(sample.labels.items()) if k[:5] != "model"
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_without_a_key_there_is_nothing_but_health(guarded: Any) -> None:
    for key in (None, "sk-alice-12", "sk-alice-1234", "sk-älice-123"):
        headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
        for path in ("/v1/models", "/openapi.json", "/nowhere"):
            answer = httpx.get(guarded.url + path, headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 401 and code(answer) == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(guarded.url + path, timeout=20).status_code == 200
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_each_key_answers_and_is_named_in_metrics(guarded: Any) -> None:
    before = metrics(guarded)
    for key in ("sk-alice-123", "sk-bob-45678"):
        assert ask(guarded, SHORT, key).status_code == 200
    now = metrics(guarded)
    for name in ("alice", "bob"):
        key = f"infopt:http_requests_total {name} /v1/completions 200"
        assert now[key] == before.get(key, 0) + 1


def test_prefixes_are_not_shared_between_keys(guarded: Any) -> None:
    body = {**SHORT, "prompt": [7] * 64, "max_tokens": 1}
    hits = []
    for key in ("sk-alice-123", "sk-bob-45678", "sk-alice-123"):
        before = metrics(guarded)["infopt:prefix_cache_hits_total"]
        assert ask(guarded, body, key).status_code == 200
        hits.append(metrics(guarded)["infopt:prefix_cache_hits_total"] - before)
    assert hits[:2] == [0, 0] and hits[2] > 0


def test_a_keys_own_concurrency(guarded: Any) -> None:
    def long() -> None:
        assert ask(guarded, LONG, "sk-bob-45678").status_code == 200

    thread = threading.Thread(target=long)
    thread.start()
    guarded.await_running()
    refused = ask(guarded, SHORT, "sk-bob-45678")
    assert refused.status_code == 429 and code(refused) == "concurrency_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    thread.join()
    assert ask(guarded, SHORT, "sk-bob-45678").status_code == 200


def test_a_keys_own_rate(guarded: Any) -> None:
    found = [ask(guarded, SHORT, "sk-carol-99").status_code for _ in range(3)]
    assert found == [200, 200, 429]


def test_a_full_queue_refuses_at_once_and_goes_on(guarded: Any) -> None:
    results: list[int] = []

    def send(body: Any) -> None:
        results.append(ask(guarded, body).status_code)

    threads = [threading.Thread(target=send, args=(LONG,)) for _ in range(4)]
    for thread in threads[:2]:
        thread.start()
    guarded.await_running(2)
    for thread in threads[2:]:
        thread.start()
    while guarded.health().json()["engine"]["waiting"] < 2:
        time.sleep(0.01)
    began = time.monotonic()
    refused = ask(guarded, SHORT)
    assert refused.status_code == 429 and code(refused) == "queue_full"
    assert time.monotonic() - began < 1 and int(refused.headers["retry-after"]) >= 1
    with (
        openai.OpenAI(
            base_url=f"{guarded.url}/v1", api_key="sk-alice-123", max_retries=0
        ) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(**{**SHORT, "stream": True})
    for thread in threads:
        thread.join()
    assert results == [200] * 4
    assert metrics(guarded)["infopt:admission_rejections_total queue_full"] >= 2
    guarded.await_idle()


def test_a_queue_that_is_full_of_tokens(guarded: Any) -> None:
    threads = [threading.Thread(target=ask, args=(guarded, LONG)) for _ in range(2)]
    for thread in threads:
        thread.start()
    guarded.await_running(2)
    waiting = threading.Thread(target=ask, args=(guarded, {**SHORT, "prompt": [5] * 400}))
    waiting.start()
    while guarded.health().json()["engine"]["waiting"] < 1:
        time.sleep(0.01)
    refused = ask(guarded, {**SHORT, "prompt": [5] * 300})
    assert refused.status_code == 429 and "prompt tokens" in refused.json()["error"]["message"]
    for thread in (*threads, waiting):
        thread.join()
    guarded.await_idle()


def test_a_deadline_ends_a_request_wherever_it_is(guarded: Any) -> None:
    late = ask(guarded, LONG, **{"x-request-timeout": "0.05"})
    assert late.status_code == 408 and code(late) == "request_timeout"
    assert late.headers["x-should-retry"] == "false"
    guarded.await_idle()
    stream = ask(guarded, {**LONG, "stream": True}, **{"x-request-timeout": "0.3"})
    assert stream.status_code == 200
    last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "request_timeout"
    guarded.await_idle()
    for wrong in ("0", "-1", "soon", "nan"):
        assert ask(guarded, SHORT, **{"x-request-timeout": wrong}).status_code == 400


def test_a_body_that_is_too_large(guarded: Any) -> None:
    told = ask(guarded, {**SHORT, "prompt": "a" * 30_000})
    assert told.status_code == 413 and "20000 bytes" in told.json()["error"]["message"]

    def pieces() -> Iterator[bytes]:  # of a length that no header tells
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"a" * 1000
        yield b'"}'

    headers = {"authorization": "Bearer sk-alice-123", "content-type": "application/json"}
    told = httpx.post(f"{guarded.url}/v1/completions", content=pieces(), headers=headers)
    assert told.status_code == 413


def test_a_request_has_an_id_in_the_answer_and_in_the_log(guarded: Any, files: Path) -> None:
    named = ask(guarded, SHORT, **{"x-request-id": "my-request-1"})
    assert named.headers["x-request-id"] == "my-request-1"
    made = ask(guarded, {**SHORT, "top_p": 7}, **{"x-request-id": "two words"})
    assert made.status_code == 400 and len(made.headers["x-request-id"]) == 32
    lines: dict[str, Any] = {}
    # a line is written when its request is over, which is after the answer was read
    deadline = time.monotonic() + 10
    while not lines.keys() >= {"my-request-1", made.headers["x-request-id"]}:
        assert time.monotonic() < deadline, lines.keys()
        text = (files / "log").read_text()
        rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        lines = {row.get("request_id"): row for row in rows}
    good, bad = lines["my-request-1"], lines[made.headers["x-request-id"]]
    assert good["status"] == 200 and good["client"] == "alice" and good["output_tokens"] == 4
    assert good["finish_reasons"] == ["length"] and 0 < good["ttft_s"] <= good["seconds"]
    assert good["prompt_tokens"] == 2 and good["error"] is None
    assert bad["status"] == 400 and bad["error"] == "invalid_value"
    assert not any("The sea" in json.dumps(row) for row in lines.values())


def test_pages_of_one_origin_may_ask(guarded: Any) -> None:
    wanted = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    told = httpx.options(f"{guarded.url}/v1/completions", headers=wanted)
    assert told.status_code == 200
    assert told.headers["access-control-allow-origin"] == "https://page.example"
    other = httpx.options(
        f"{guarded.url}/v1/completions", headers={**wanted, "origin": "https://other.example"}
    )
    assert other.status_code == 400


def test_metrics_add_up(guarded: Any) -> None:
    before = metrics(guarded)
    assert ask(guarded, {**SHORT, "n": 2, "prompt": ["a b", "c d"]}).status_code == 200
    now = metrics(guarded)

    def rise(name: str) -> float:
        return now[f"infopt:{name}"] - before.get(f"infopt:{name}", 0)

    assert rise("generation_tokens_total") == 16
    assert rise("request_success_total length") == 4
    assert rise("time_to_first_token_seconds_count") == 2
    assert rise("inter_token_latency_seconds_count") == 12
    assert rise("e2e_request_latency_seconds_count") == 4
    assert rise("request_queue_time_seconds_count") == 2
    assert rise("iteration_tokens_total_count") == rise("engine_steps_total") > 0
    assert now["infopt:kv_blocks_used"] == 0 < now["infopt:kv_blocks_total"]


def test_keys_and_limits_are_read_again_on_a_hangup(guarded: Any, files: Path) -> None:
    (files / "keys").write_text(KEYS + "sk-dave-1234 name=dave\n")
    assert ask(guarded, SHORT, "sk-dave-1234").status_code == 401
    guarded.process.send_signal(signal.SIGHUP)
    assert "4 API keys" in guarded.line("reloaded")
    assert ask(guarded, SHORT, "sk-dave-1234").status_code == 200
    (files / "keys").write_text("bad\n")
    guarded.process.send_signal(signal.SIGHUP)
    assert "nothing was reloaded" in guarded.line("warning")
    assert ask(guarded, SHORT, "sk-dave-1234").status_code == 200
