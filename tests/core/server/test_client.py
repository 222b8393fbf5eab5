"""What OpenAI's client can do beyond a plain request: its helpers, its types, its errors."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
GREEDY: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
HOT: Any = {"model": "tiny", "messages": HELLO, "temperature": 1.5, "seed": 4}


class Person(BaseModel):
    """A person."""

    name: Literal["Ada", "Alan"]
    age: int = Field(ge=0, le=99)


class Add(BaseModel):
    """Add two numbers."""

    a: int = Field(ge=0, le=99)
    b: Literal[1, 2, 3]


ADD: Any = openai.pydantic_function_tool(Add)


def test_a_small_top_p_is_greedy(client: openai.OpenAI) -> None:
    greedy = client.completions.create(prompt="a", **GREEDY)
    narrow = client.completions.create(
        model="tiny", prompt="a", max_tokens=12, top_p=1e-9, temperature=1
    )
    assert narrow.choices[0].text == greedy.choices[0].text


def test_the_two_names_of_a_limit(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    for limit in ("max_tokens", "max_completion_tokens"):
        ask: Any = {"model": "tiny", "messages": HELLO, limit: 7}
        answer = client.chat.completions.create(extra_body=extra, **ask)
        assert answer.usage is not None and answer.usage.completion_tokens == 7
        assert answer.choices[0].finish_reason == "length"
        # Load generators send both, to either endpoint.
        both = extra | {"max_tokens": 7, "max_completion_tokens": 7}
        plain = client.completions.create(model="tiny", prompt="a", extra_body=both)
        assert plain.usage is not None and plain.usage.completion_tokens == 7


def test_tokens_that_end_an_answer(client: openai.OpenAI, tokenizer: Any) -> None:
    free = client.completions.create(prompt="a", logprobs=0, **GREEDY)
    assert free.choices[0].logprobs is not None
    tokens = [tokenizer.encode(token)[0] for token in free.choices[0].logprobs.tokens or []]
    stop = tokens[5]
    first = tokens.index(stop)
    cut = client.completions.create(
        prompt="a", extra_body={"stop_token_ids": [stop]}, **GREEDY
    ).choices[0]
    assert cut.finish_reason == "stop" and cut.text == tokenizer.decode(tokens[:first])


def test_special_tokens_are_shown_on_request(client: openai.OpenAI, tokenizer: Any) -> None:
    ask: Any = {**GREEDY, "prompt": "a", "logit_bias": {"1": 100}, "max_tokens": 2}
    special = tokenizer.decode([1])
    assert client.completions.create(**ask).choices[0].text == ""
    shown = client.completions.create(extra_body={"skip_special_tokens": False}, **ask)
    assert shown.choices[0].text == special * 2


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_seed_draws_the_same_streamed_or_not(client: openai.OpenAI, kind: str) -> None:
    options = {"include_usage": True}
    if kind == "completions":
        ask: Any = {"model": "tiny", "prompt": "x", "seed": 3, "n": 2, "max_tokens": 10}
        whole: Any = client.completions.create(**ask)
        stream: Any = client.completions.create(stream=True, stream_options=options, **ask)
        wanted = [choice.text for choice in whole.choices]
    else:
        ask = {**HOT, "n": 2, "max_tokens": 10}
        whole = client.chat.completions.create(**ask)
        stream = client.chat.completions.create(stream=True, stream_options=options, **ask)
        wanted = [choice.message.content for choice in whole.choices]
    *chunks, last = stream
    texts = ["", ""]
    for chunk in chunks:
        assert chunk.usage is None and len(chunk.choices) == 1
        choice = chunk.choices[0]
        text = choice.text if kind == "completions" else choice.delta.content
        texts[choice.index] += text or ""
    assert texts == wanted and wanted[0] != wanted[1]
    assert last.choices == [] and last.usage == whole.usage
    assert {chunk.id for chunk in chunks} == {last.id}


def test_parsed_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(response_format=Person, **HOT)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    structured = {"structured_outputs": {"choice": ["The sea is wide.", "It is deep."]}}
    whole = client.chat.completions.create(extra_body=structured, **HOT)
    with client.chat.completions.stream(extra_body=structured, **HOT) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(texts) == final.choices[0].message.content == whole.choices[0].message.content


def test_strict_tools_through_the_helpers(client: openai.OpenAI) -> None:
    """They are what the client makes of a pydantic model, and parse into it again."""
    ask = {**HOT, "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.chat.completions.parse(**ask).choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Add)
    with client.chat.completions.stream(**ask) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert [event.name for event in done] == ["Add"]
    assert done[0].parsed_arguments == call.function.parsed_arguments
    assert final.finish_reason == "tool_calls" and final.message.tool_calls
    free = client.chat.completions.create(**{**HOT, "tools": [ADD], "max_tokens": 20})
    assert free.choices[0].message.content


def test_an_answer_goes_back_as_it_came(client: openai.OpenAI) -> None:
    ask = {**HOT, "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**ask).choices[0].message
    assert message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}
    chat: Any = [*HELLO, message, result]
    again = client.chat.completions.create(model="tiny", messages=chat, max_tokens=4)
    plain = again.choices[0].message
    chat = [*HELLO, plain, HELLO[0]]
    assert client.chat.completions.create(model="tiny", messages=chat, max_tokens=4).choices


def test_the_asynchronous_client(server: Any) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=60
        ) as client:
            asked = [
                client.chat.completions.create(messages=HELLO, **GREEDY),
                client.chat.completions.create(messages=HELLO, **GREEDY),
            ]
            one, two = await asyncio.gather(*asked)
            assert one.choices == two.choices
            stream = await client.completions.create(
                model="tiny", prompt="x", max_tokens=400, stream=True
            )
            async for _ in stream:
                break
            await stream.close()
            task = asyncio.create_task(client.embeddings.create(model="tiny", input=["x"] * 500))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert server.await_idle()["blocks_used"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_types(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(messages=HELLO, stream=stream, **{**GREEDY, "top_p": 2})
    assert bad.value.param == "top_p" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(prompt="x", stream=stream, **{**GREEDY, "max_tokens": 600})
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="is refused"):
        structured = {"structured_outputs": {"regex": "("}}
        client.completions.create(prompt="x", stream=stream, extra_body=structured, **GREEDY)
    with pytest.raises(openai.NotFoundError) as none:
        client.completions.create(prompt="x", stream=stream, **{**GREEDY, "model": "gpt-9"})
    assert none.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/images"):
        client.images.generate(prompt="a sea")
