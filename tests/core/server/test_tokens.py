from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import httpx
import openai
import pytest

HELLO: Any = [{"role": "user", "content": "Hello there"}]


def post(server: Any, path: str, **body: Any) -> Any:
    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_to_tokens_and_back(server: Any, tokenizer: Any) -> None:
    text = "Grüße, <|im_start|> 世界"
    told = post(server, "/tokenize", model="tiny", prompt=text)
    assert told["tokens"] == tokenizer.encode(text)
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] == 512
    assert told["token_strs"] is None
    assert post(server, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
    names = post(server, "/tokenize", prompt=text, return_token_strs=True)["token_strs"]
    assert names == tokenizer.convert_ids_to_tokens(told["tokens"])
    assert post(server, "/tokenize", prompt="")["tokens"] == []
    assert post(server, "/detokenize", tokens=[])["prompt"] == ""


def test_a_chat_is_counted_as_it_is_answered(client: openai.OpenAI, server: Any) -> None:
    told = post(server, "/tokenize", messages=HELLO)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens == told["count"]
    shorter = post(server, "/tokenize", messages=HELLO, add_generation_prompt=False)
    assert told["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < told["count"]


class Adding:
    """A tokenizer that puts a special token before a text."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found: list[int] = self.inner.encode(text, add_special_tokens=False)
        return [1, *found] if add_special_tokens else found


def test_special_tokens_are_added_to_texts_alone(in_process: Callable[..., Any]) -> None:
    app = in_process()
    app.service.prompts.tokenizer = Adding(app.tokenizer)

    async def test(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        async def first(**body: Any) -> int:
            return int((await plain.post("/tokenize", json=body)).json()["tokens"][0])

        hello = app.tokenizer.encode("Hello", add_special_tokens=False)[0]
        assert await first(prompt="Hello") == 1
        assert await first(prompt="Hello", add_special_tokens=False) == hello
        chat = app.tokenizer.apply_chat_template(HELLO, tokenize=False)
        begin = app.tokenizer.encode(chat, add_special_tokens=False)[0]
        assert [await first(messages=HELLO), begin] == [begin, begin]
        both = await plain.post("/tokenize", json={"messages": HELLO, "add_special_tokens": True})
        assert both.json()["tokens"][:2] == [1, begin]

    app.run(test)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/tokenize", {"messages": HELLO, "tools": [{}]}, "tools.0.type"),
        ("/tokenize", {"prompt": "a", "colour": "red"}, "colour"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
    ],
    ids=str,
)
def test_what_is_refused(server: Any, path: str, body: Any, param: str) -> None:
    response = httpx.post(server.url + path, json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_another_model(server: Any) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        response = httpx.post(server.url + path, json={"model": "gpt-9", **body})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_the_version(server: Any) -> None:
    assert httpx.get(f"{server.url}/version").json() == {"version": version("infopt")}
