"""Bodies that nobody foresaw: an answer or a refusal in OpenAI's shape, and never a fault."""

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infopt.core.server.app import create_app

SCHEMA: Any = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"anyOf": [{"enum": [1, "x"]}, {"$ref": "#"}]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
}
CALL: Any = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAMPLED: Any = {
    "model": "tiny",
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x", "y"],
    "seed": 1,
    "n": 2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"5": 1},
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 4,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "stop_token_ids": [7],
    "priority": 1,
    "cache_salt": "s",
    "user": "u",
}
CHAT: Any = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "u"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "c", "name": "f", "content": "1"},
]
STREAMED: Any = {"stream": True, "stream_options": {"include_usage": True}}
Send = Callable[[str, bytes], int]
BODIES: list[tuple[str, Any]] = [
    ("/v1/completions", {**SAMPLED, "prompt": ["a", "b"], "echo": True, "logprobs": 2}),
    ("/v1/completions", {**SAMPLED, **STREAMED, "prompt": [[1, 2], [3]]}),
    (
        "/v1/completions",
        {"prompt": "a", "n": 2, "max_tokens": 4, "use_beam_search": True, "temperature": 0},
    ),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": SCHEMA}}),
    ("/v1/chat/completions", {**SAMPLED, "messages": CHAT, "logprobs": True, "top_logprobs": 2}),
    (
        "/v1/chat/completions",
        {"messages": CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": True},
    ),
    ("/v1/chat/completions", {**STREAMED, "messages": CHAT, "tools": [TOOL]}),
    (
        "/v1/chat/completions",
        {
            "messages": CHAT,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            },
        },
    ),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 4}),
    ("/v1/embeddings", {"input": [[1, 2], [3]], "pooling": "last", "model": "tiny"}),
    ("/tokenize", {"prompt": "a", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT, "tools": [TOOL], "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [1, 2, 3], "model": "tiny"}),
]
PATHS = sorted({path for path, _ in BODIES})

ODD = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    2**31,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]
ODD += [
    "",
    "x",
    "\ud800",
    "\x00",
    "none",
    "a" * 5000,
    [],
    {},
    [None],
    [[]],
    [{}],
    {"": None},
    [1.5],
]
ODD += [
    "{",
    '{"a":',
    "auto",
    "object",
    "#/$defs/x",
    "[" * 500,
    49152,
    10**9,
    "\U0001f600",
    [[[[1]]]],
]
values = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=5) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["type", "name"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "drop", "add", "nest", "graft", "graft", "small"]),
        st.integers(0, 10**6),
        values,
    ),
    min_size=1,
    max_size=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def changed(body: Any, change: tuple[str, int, Any]) -> None:
    """Do to one place of a body what the change says."""
    kind, number, value = change
    found = list(places(body))
    if not found:
        return
    *way, last = found[number % len(found)]
    owner = body
    for key in way:
        owner = owner[key]
    match kind:
        case "set":
            owner[last] = value
        case "small":
            owner[last] = number % 7
        case "graft":  # what another body has, which may not go with the rest
            donor = BODIES[number % len(BODIES)][1]
            key = list(donor)[number // len(BODIES) % len(donor)]
            body[key] = copy.deepcopy(donor[key])
        case "drop":
            del owner[last]
        case "add" if isinstance(owner, dict):
            owner[str(value)[:20]] = value
        case "nest":
            for _ in range(number % 300):
                value = {"a": value} if number % 2 else [value]
            owner[last] = value


def check(path: str, response: httpx.Response) -> None:
    assert response.status_code < 500, (path, response.text[:300])
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
        return
    told = response.json()
    if response.status_code != 200:
        assert set(told) == {"error"}, told
        error = told["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def send(tokenizer: Any, in_process: Any) -> Iterator[Send]:
    """Send a body to an app with a scripted engine, and check what comes back, in time."""
    service = in_process("So <tool_call> a b x").service
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=transport, base_url="http://app")

        async def post(path: str, body: bytes) -> int:
            async with asyncio.timeout(20):
                response = await client.post(path, content=body)
            check(path, response)
            return response.status_code

        yield lambda path, body: runner.run(post(path, body))
    service.prompts.close()


def fuzz(count: int) -> Any:
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def mutated(send: Send, which: int, found: list[Any]) -> None:
    path, body = BODIES[which]
    body = copy.deepcopy(body)
    for change in found:
        changed(body, copy.deepcopy(change))
    send(path, json.dumps(body).encode())


BASES = st.integers(0, len(BODIES) - 1)


def test_the_bodies_to_begin_with_are_good(send: Send) -> None:
    for path, body in BODIES:
        assert send(path, json.dumps(body).encode()) == 200, body


@given(which=BASES, found=changes)
@fuzz(400)
def test_good_bodies_gone_bad(send: Send, which: int, found: list[Any]) -> None:
    mutated(send, which, found)


@given(path=st.sampled_from(PATHS), body=values.map(json.dumps).map(str.encode) | st.binary())
@fuzz(100)
def test_bodies_of_any_kind(send: Send, path: str, body: bytes) -> None:
    send(path, body)


@pytest.mark.slow
@given(which=BASES, found=changes)
@fuzz(5000)
def test_many_good_bodies_gone_bad(send: Send, which: int, found: list[Any]) -> None:
    mutated(send, which, found)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"tools": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"prompt": ' + b"9" * 10_000 + b"}",
        b'{"input": "a", "prompt": "a", "messages": NaN}',
        b"\xff\xfe{}",
        b'{"prompt": "a", "prompt": 1}',
        b"null",
    ],
    ids=range(9),
)
def test_bodies_that_are_hard_to_read(send: Send, path: str, body: bytes) -> None:
    send(path, body)
