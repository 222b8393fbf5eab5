"""Embeddings through OpenAI's client are transformers' hidden states, pooled."""

import base64
import json
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from infopt.core.server.embeddings import MAX_INPUTS

TEXTS = ["The sea is wide.", "Grüße aus Zürich", "one", "The sea is wide. " * 20]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Callable[[list[int], str], Tensor]:
    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)

    def pooled(tokens: list[int], pooling: str = "mean") -> Tensor:
        states = model(torch.tensor([tokens])).last_hidden_state[0]
        return torch.nn.functional.normalize(
            states.mean(0) if pooling == "mean" else states[-1], dim=0
        )

    return pooled


def close(found: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=0)


def test_they_are_the_models_own(
    client: openai.OpenAI, tokenizer: Any, reference: Callable[..., Tensor]
) -> None:
    """The client asks for base64, and gets floats out of it."""
    tokens = [tokenizer.encode(text) for text in TEXTS]
    wanted = [reference(each) for each in tokens]
    several = client.embeddings.create(model="tiny", input=TEXTS)
    assert several.model == "tiny" and several.object == "list"
    assert [item.index for item in several.data] == list(range(len(TEXTS)))
    count = sum(map(len, tokens))
    assert several.usage.prompt_tokens == several.usage.total_tokens == count
    for text, given, item, vector in zip(TEXTS, tokens, several.data, wanted, strict=True):
        close(item.embedding, vector)
        for way in (text, [text], given, [given]):
            (alone,) = client.embeddings.create(model="tiny", input=way).data
            close(alone.embedding, vector)
    floats = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for item, vector in zip(floats.data, wanted, strict=True):
        close(item.embedding, vector)
        assert sum(x * x for x in item.embedding) == pytest.approx(1, abs=1e-6)


def test_the_last_state_and_the_size(
    client: openai.OpenAI, tokenizer: Any, reference: Callable[..., Tensor]
) -> None:
    last = {"pooling": "last"}
    found = client.embeddings.create(model="tiny", input=TEXTS, dimensions=64, extra_body=last)
    for text, item in zip(TEXTS, found.data, strict=True):
        close(item.embedding, reference(tokenizer.encode(text), "last"))


def test_the_server_may_be_told_how_to_pool(in_process: Callable[..., Any]) -> None:
    app = in_process(pooling="last")

    async def test(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        await client.embeddings.create(model="tiny", input="a")
        await client.embeddings.create(
            model="tiny",
            input=[[1, 2, 3], [4]],
            user="me",
            extra_body={"pooling": "mean", "priority": -2, "cache_salt": "s"},
        )
        raw = await plain.post("/v1/embeddings", json={"input": [[1, 2, 3]]})
        assert raw.json()["data"][0]["embedding"] == [3.0] * 4, "floats unless asked otherwise"
        body = {"input": [[1, 2, 3]], "encoding_format": "base64"}
        text = (await plain.post("/v1/embeddings", json=body)).json()["data"][0]["embedding"]
        assert struct.unpack("<4f", base64.b64decode(text)) == (3.0,) * 4

    app.run(test)
    assert [params.pooling for _, params in app.engine.asked[:3]] == ["last", "mean", "mean"]
    assert {(params.priority, params.cache_salt) for _, params in app.engine.asked[1:3]} == {
        (-2, "s")
    }


def test_beside_other_requests(server: Any, client: openai.OpenAI, tokenizer: Any) -> None:
    """They share steps with streams, and neither changes the other."""
    ask: Any = {"model": "tiny", "prompt": TEXTS[0], "temperature": 0, "max_tokens": 60}
    alone = client.completions.create(**ask).choices[0].text
    vector = client.embeddings.create(model="tiny", input=TEXTS[3]).data[0].embedding
    texts: list[str] = []
    thread = threading.Thread(
        target=lambda: texts.append(client.completions.create(**ask).choices[0].text)
    )
    thread.start()
    found = [client.embeddings.create(model="tiny", input=TEXTS[3]) for _ in range(4)]
    thread.join()
    assert texts == [alone]
    for each in found:
        close(each.data[0].embedding, torch.tensor(vector))
    assert server.await_idle()["blocks_used"] == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [49152]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [[1]] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [5] * 513}, "input"),
        ({"input": "a", "dimensions": 32}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(server: Any, change: Any, param: str) -> None:
    response = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", **change})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"].split(".")[0] == param and param in error["message"]


def test_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="holds 512 tokens; you asked for 513") as bad:
        client.embeddings.create(model="tiny", input=[5] * 513)
    assert bad.value.code == "context_length_exceeded" and bad.value.param == "input"
    assert len(client.embeddings.create(model="tiny", input=[5] * 512).data) == 1
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        client.embeddings.create(model="gpt-9", input="a")


def test_a_client_that_leaves_frees_its_blocks(server: Any) -> None:
    before = server.await_idle()["steps"]
    body = json.dumps({"input": [[5] * 500] * 400}).encode()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.await_running()
    steps = server.await_idle()["steps"]
    assert steps - before < 300, "it did not run to its end"
