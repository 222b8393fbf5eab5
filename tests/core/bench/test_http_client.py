import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from infopt.core.bench.client import Chunk, Request
from infopt.core.bench.http_client import HttpClient
from infopt.core.bench.records import Trip, record
from infopt.core.errors import EngineError, UsageError
from infopt.core.reports.requests import RequestRecord

ASK = Request((1, 2, 3, 4), 3)


def collect(url: str, request: Request = ASK) -> tuple[list[Chunk], list[str]]:
    """The chunks of one request, and the client's warnings."""

    async def run() -> tuple[list[Chunk], list[str]]:
        async with HttpClient(url) as client, aclosing(client.send(request)) as stream:
            return [chunk async for chunk in stream], list(client.warnings)

    return asyncio.run(run())


def after_probe(mock: Any, script: list[float | bytes]) -> Callable[[dict[str, Any]], Any]:
    """A script for the request proper; the client's probe is answered plainly."""

    def answer(body: dict[str, Any]) -> list[float | bytes]:
        return [mock.frame("x"), mock.DONE] if body["max_tokens"] == 2 else script

    return answer


def sampled(chunks: list[Chunk]) -> RequestRecord:
    return record(Trip(0, 0, 0.0, 0.0, 0.0, 3, chunks=chunks), counted_by="usage")


def test_what_is_sent(mock: Any) -> None:
    server = mock(lambda body: [mock.frame("a", finish="length"), mock.DONE])
    collect(server.url + "/v1/")
    body = server.bodies[-1]
    assert body["prompt"] == [1, 2, 3, 4] and body["max_tokens"] == 3 and body["model"] == "mock"
    assert body["temperature"] == 0 and body["stream"] and body["ignore_eos"]
    assert body["stream_options"]["include_usage"]


def test_the_role_the_finish_and_comments_are_no_content(mock: Any) -> None:
    role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    delta = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
    script = [
        role,
        0.05,
        b": keep-alive\n\n",
        0.05,
        delta,
        mock.frame("", finish="stop"),
        mock.frame(None, usage=mock.usage(1)),
        mock.DONE,
    ]
    chunks, _ = collect(mock(after_probe(mock, script)).url)
    assert [chunk.content for chunk in chunks] == [False, True, False, False]
    sample = sampled(chunks)
    assert sample.first is not None and sample.first - chunks[0].time > 0.09, (
        "the role chunk did not stamp the first token"
    )
    assert sample.output_tokens == 1 and sample.tpot is None and sample.prompt_tokens == 4


def test_frames_split_across_reads_and_joined_in_one(mock: Any) -> None:
    stream = mock.frame("ä") + mock.frame("b") + mock.frame("c", finish="length") + mock.DONE
    cuts = [20, 21, 45, 46, 100]
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    script = [act for piece in pieces for act in (piece, 0.01)]
    split, _ = collect(mock(after_probe(mock, script)).url)
    joined, _ = collect(mock(after_probe(mock, [stream])).url)
    assert [c.content for c in split] == [c.content for c in joined] == [True, True, True]
    assert len({chunk.time for chunk in split}) > 1
    assert len({chunk.time for chunk in joined}) == 1, "one read, one time"


def test_a_frame_of_100_kb(mock: Any) -> None:
    script = [mock.frame("x" * 100_000), mock.frame("y", finish="length"), mock.DONE]
    chunks, _ = collect(mock(after_probe(mock, script)).url)
    assert [chunk.content for chunk in chunks] == [True, True]


def test_running_usage_gives_the_tokens_of_each_chunk(mock: Any) -> None:
    frames = [mock.frame("ab", usage=mock.usage(2)), 0.02, mock.frame("cd", usage=mock.usage(4))]
    chunks, _ = collect(mock(after_probe(mock, [*frames, mock.DONE])).url)
    assert [chunk.completion_tokens for chunk in chunks] == [2, 4]
    assert sampled(chunks).tokens_at_first == 2


@pytest.mark.parametrize("missing", [{}, {"usage": None}, {"usage": "none"}])
def test_missing_usage(mock: Any, missing: dict[str, Any]) -> None:
    script = [mock.frame("a", **missing), mock.frame("b", finish="stop", **missing), mock.DONE]
    sample = sampled(collect(mock(after_probe(mock, script)).url)[0])
    assert sample.count_source == "chunks" and sample.output_tokens == 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([b'data: {"error": {"message": "out of blocks", "code": 500}}\n\n'], "out of blocks"),
        ([b"data: {nonsense}\n\n"], "not JSON"),
        ([b"data: [1]\n\n"], "not an object"),
        ([b'data: {"choices": [{"text": "a"}]}\n\n'], "ended before the answer did"),
        ((500, b'{"error": {"message": "no engine"}}'), "HTTP 500: no engine"),
        ((502, b"<html>bad\n gateway</html>"), "HTTP 502: the server did not answer as an OpenAI"),
    ],
)
def test_failures_are_failures_even_under_200(mock: Any, script: Any, reason: str) -> None:
    server = mock(after_probe(mock, script))
    with pytest.raises(EngineError, match=reason):
        collect(server.url)


def test_a_clean_end_without_done_is_an_end(mock: Any) -> None:
    chunks, _ = collect(mock(after_probe(mock, [mock.frame("a", finish="stop")])).url)
    assert len(chunks) == 1


@pytest.mark.parametrize("named", [True, False])
def test_refused_extensions_are_given_up_with_a_warning(mock: Any, named: bool) -> None:
    def strict(body: dict[str, Any]) -> Any:
        unknown = {"ignore_eos", "skip_special_tokens"} & set(body)
        if unknown or "continuous_usage_stats" in body["stream_options"]:
            word = min(unknown or {"continuous_usage_stats"}) if named else "a field"
            return 400, json.dumps({"error": {"message": f"unknown {word}"}}).encode()
        return [mock.frame("a", finish="stop"), mock.DONE]

    server = mock(strict)
    chunks, warnings = collect(server.url)
    assert len(chunks) == 1 and len(warnings) == 3
    assert any("ignore_eos" in warning and "end before" in warning for warning in warnings)
    assert server.bodies[-1]["stream_options"] == {"include_usage": True}


def test_another_400_is_told(mock: Any) -> None:
    server = mock(lambda body: (400, b'{"error": {"message": "bad model"}}'))
    with pytest.raises(EngineError, match="HTTP 400: bad model"):
        collect(server.url)


def test_a_foreign_server_gets_words(mock: Any) -> None:
    server = mock(lambda body: [mock.frame("a", finish="stop"), mock.DONE], vocab_size=None)
    _, warnings = collect(server.url, Request("time year", 3))
    assert isinstance(server.bodies[0]["prompt"], str)
    assert any("as the server counts" in warning for warning in warnings)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"no server answers at {url}"):
        collect(url)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host",
        "",
        "http://[::1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:x",
        "http://:80",
    ],
)
def test_not_a_url(url: str) -> None:
    with pytest.raises(UsageError, match="not the URL of a server"):
        HttpClient(url)
