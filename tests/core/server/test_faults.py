"""What clients and models do wrong: each test ends with all blocks free, memory as it was, and the
next request answered."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

SHORT: Any = {"model": "tiny", "prompt": "The sea", "max_tokens": 4, "temperature": 0}
LONG: Any = {"model": "tiny", "prompt": [5] * 16, "max_tokens": 400, "ignore_eos": True}
SPARE = 48 * 2**20
"""What a process may grow by: arenas and caches of one more thread, no more."""


def memory(server: Any) -> int:
    """Resident bytes of both processes."""
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children()))


@pytest.fixture
def well(server: Any) -> Iterator[Any]:
    """The shared server, which has to be as it was in the end."""
    answer = server.post(SHORT).json()["choices"][0]["text"]
    # The first grammar reads the tokenizer.
    assert server.post({**SHORT, "structured_outputs": {"choice": ["a"]}}).is_success
    before = memory(server)
    yield server
    server.await_idle()
    assert server.post(SHORT).json()["choices"][0]["text"] == answer
    assert memory(server) - before < SPARE


def raw(server: Any, body: Any, path: str = "/v1/completions") -> socket.socket:
    """A request as bytes on a socket, whose answer nobody has read yet."""
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    found = socket.create_connection((parts.hostname, parts.port), timeout=60)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    found.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wait", [0.0, 0.02, 0.3])
def test_who_leaves_at_any_moment(well: Any, stream: bool, wait: float) -> None:
    for _ in range(3):
        with raw(well, {**LONG, "stream": stream}):
            time.sleep(wait)
        httpx.get(f"{well.url}/metrics", timeout=20)


def test_who_leaves_the_queue(launch: Callable[..., Any]) -> None:
    server = launch(max_running=1).ready()
    with ExitStack() as stack:
        stack.enter_context(raw(server, {**LONG, "stream": True}))
        server.await_running()
        for _ in range(5):
            stack.enter_context(raw(server, LONG))
        while server.health().json()["engine"]["waiting"] < 5:
            time.sleep(0.01)
    server.await_idle(5)
    assert server.post(SHORT).is_success
    assert server.stop() == 0


def test_a_body_that_never_comes_whole(well: Any) -> None:
    """Who announces more than it sends waits alone."""
    parts = urlsplit(well.url)
    with ExitStack() as stack:
        for _ in range(20):
            found = socket.create_connection((parts.hostname, parts.port))  # type: ignore[arg-type]
            stack.enter_context(found)
            head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n"
            found.sendall(head.encode() + b"{")
        assert well.post(SHORT).is_success


def test_a_slow_reader_holds_nobody_up(well: Any) -> None:
    """Its stream waits in the API process; the engine is done with it like with any other."""
    body = {**LONG, "n": 16, "stream": True, "logprobs": 20, "prompt": [9] * 32}
    with raw(well, body) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        well.await_running()
        began = time.monotonic()
        assert well.post(SHORT).is_success
        assert time.monotonic() - began < 10
        well.await_idle(60)


@pytest.mark.parametrize("length", [510, 511, 512, 513, 600])
def test_a_prompt_at_the_limit_and_over_it(well: Any, length: int) -> None:
    """512 tokens fit, one of them the answer."""
    answer = well.post({**SHORT, "prompt": [5] * length, "max_tokens": 1})
    assert answer.status_code == (200 if length < 512 else 400)
    assert length < 512 or str(length) in answer.json()["error"]["message"]


def hostile(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


@pytest.mark.parametrize(
    ("schema", "status"),
    [
        ({"type": "string", "pattern": "(" * 200 + ")" * 200}, (200, 400)),
        ({"type": "string", "pattern": "(a+)+$"}, (200, 400)),
        ({"$ref": "#"}, (200, 400)),
        ({"$ref": "file:///etc/passwd"}, (400,)),
        ({"type": "array", "minItems": 10**9}, (200, 400)),
        (hostile(9), (200, 400)),
        ({"enum": ["x" * 100] * 100_000}, (400, 413)),
        ({"type": "string", "description": "x" * 17_000_000}, (413,)),
    ],
    ids=["parens", "backtrack", "loop", "file", "items", "wide", "10 MB", "17 MB"],
)
def test_a_hostile_schema(well: Any, schema: Any, status: tuple[int, ...]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
    began = time.monotonic()
    answer = well.post({**body, "response_format": form}, "/v1/chat/completions")
    assert answer.status_code in status, answer.text[:200]
    assert time.monotonic() - began < 20


def test_a_thousand_connections(well: Any) -> None:
    """All are answered; those beyond the queue's bound with 429."""
    parts = urlsplit(well.url)

    def ask(index: int) -> int:
        with raw(well, {**SHORT, "max_tokens": 1, "prompt": [index % 1000 + 5]}) as found:
            return int(found.recv(64).split()[1])

    with ExitStack() as idle:
        for _ in range(900):  # of those that only hold a connection
            address = (parts.hostname, parts.port)
            idle.enter_context(socket.create_connection(address))  # type: ignore[arg-type]
        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(ask, range(200)))
    assert set(found) <= {200, 429} and found.count(200) >= 100


def test_a_pool_that_is_always_full(launch: Callable[..., Any]) -> None:
    """Far more work than blocks: requests give way to each other, and all answers are right."""
    server = launch(kv_blocks=12, max_model_len=160).ready()
    bodies = [{**SHORT, "prompt": [7 + i] * 40, "max_tokens": 60} for i in range(12)]
    alone = [server.post(body).json()["choices"][0]["text"] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        together = [answer.json()["choices"][0]["text"] for answer in pool.map(server.post, bodies)]
    assert together == alone
    stats = server.await_idle()
    assert stats["preemptions"] > 0 and stats["blocks_free"] == 12
    assert server.stop() == 0


def test_weights_that_are_not_finite(
    tiny_model: Path, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    """The request fails, by the layer's name; the server does not."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    table = "model.embed_tokens.weight"
    weights[table] = weights[table].clone()
    weights["lm_head.weight"] = weights[table].clone()
    weights[table][77] = torch.nan  # of one token alone
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    server = launch(model=folder).ready()
    for body in ({**SHORT, "prompt": [5, 77, 6]}, {**LONG, "prompt": [77], "stream": True}):
        answer = server.post(body)
        assert "not finite" in answer.text
    assert server.post({**SHORT, "prompt": [77]}).status_code == 500
    server.await_idle()
    assert server.post({**SHORT, "prompt": [5, 6]}).is_success
    assert server.health().json()["status"] == "ok"
    assert server.stop() == 0


def test_mixed_traffic_leaves_nothing_behind(well: Any) -> None:
    """What `docs/results/serving_soak.py` does for half an hour, for some seconds."""
    rounds = 40
    codes: list[int] = []
    lock = threading.Lock()

    def one(index: int) -> None:
        body = {
            **SHORT,
            "prompt": [index % 50 + 5] * (index % 60 + 1),
            "max_tokens": index % 20 + 1,
        }
        match index % 8:
            case 0:
                with raw(well, {**LONG, "stream": True}):
                    time.sleep(0.01 * (index % 5))
                return
            case 1:
                answer = well.post({**body, "top_p": 9})
            case 2:
                answer = well.post({**body, "n": 3, "temperature": 1})
            case 3:
                answer = well.post({"model": "tiny", "input": "a b c"}, "/v1/embeddings")
            case 4:
                answer = well.post({**body, "stream": True, "stop": ["a", "e"]})
            case 5:
                answer = httpx.get(f"{well.url}/metrics", timeout=20)
            case _:
                answer = well.post(body)
        with lock:
            codes.append(answer.status_code)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8 * rounds)))
    assert len(codes) == 7 * rounds and set(codes) == {200, 400}
