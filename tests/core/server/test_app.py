"""Any OpenAI client works unchanged: the openai package against a real server."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from infopt.core.artifact.read import read_artifact
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.llm import LLM
from infopt.core.runtime.request import SamplingParams

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
TEXTS = [f"The number {n} is" for n in range(8)]
GREEDY: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def post(server: Any, body: Any, path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[str]:
    """The engine's own greedy answers, without a server."""
    llm = LLM(read_artifact(tiny_model), EngineSettings(kv_blocks=64, dtype="float32"))
    params = SamplingParams(max_tokens=12, temperature=0.0)
    return [llm.generate(text, params)[0].text for text in TEXTS]


def test_completions_are_those_of_the_engine(client: openai.OpenAI, expected: list[str]) -> None:
    answer = client.completions.create(prompt=TEXTS[0], **GREEDY)
    assert answer.choices[0].text == expected[0]
    assert answer.choices[0].finish_reason == "length" and answer.model == "tiny"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_joined_is_the_answer(client: openai.OpenAI, expected: list[str]) -> None:
    stream = client.completions.create(prompt=TEXTS[0], stream=True, **GREEDY)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert len(chunks) > 1


def test_eight_at_once(client: openai.OpenAI, expected: list[str]) -> None:
    def ask(text: str) -> str:
        return client.completions.create(prompt=text, **GREEDY).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, TEXTS)) == expected


def test_a_batch_of_prompts(client: openai.OpenAI, expected: list[str]) -> None:
    answer = client.completions.create(prompt=TEXTS, **GREEDY)
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None and answer.usage.completion_tokens == 96
    texts = [""] * 8
    for chunk in client.completions.create(prompt=TEXTS, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_prompts_as_tokens(
    client: openai.OpenAI, default_artifact: Any, expected: list[str]
) -> None:
    tokens = [default_artifact.tokenizer().encode(text) for text in TEXTS[:2]]
    one = client.completions.create(prompt=tokens[0], **GREEDY)
    two = client.completions.create(prompt=tokens, **GREEDY)
    assert one.choices[0].text == expected[0]
    assert [choice.text for choice in two.choices] == expected[:2]


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=HELLO, **GREEDY)
    text = answer.choices[0].message.content
    assert text and answer.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    first, *middle, last = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in middle) == text
    assert middle[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage == answer.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_uses_the_template(client: openai.OpenAI, default_artifact: Any) -> None:
    tokenizer = default_artifact.tokenizer()
    text = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    chat = client.chat.completions.create(messages=HELLO, **GREEDY)
    plain = client.completions.create(prompt=tokens, **GREEDY)
    assert chat.usage is not None and chat.usage.prompt_tokens == len(tokens)
    assert chat.choices[0].message.content == plain.choices[0].text
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    again = client.chat.completions.create(messages=parts, **GREEDY)
    assert again.choices[0].message.content == plain.choices[0].text


def test_raw_events(server: Any) -> None:
    """`[DONE]` ends the stream; the usage so far is in every chunk where that is asked for."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**GREEDY, "prompt": "a", "stream": True, "stream_options": options}
    response = post(server, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-2:] == [12, 12]
    assert events[-1]["choices"] == []


def test_stop_strings(client: openai.OpenAI, expected: list[str]) -> None:
    stop = expected[0][5:8]
    cut = expected[0][: expected[0].index(stop)]
    answer = client.completions.create(prompt=TEXTS[0], stop=stop, **GREEDY)
    assert answer.choices[0].text == cut and answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(prompt=TEXTS[0], stop=["@@", stop], stream=True, **GREEDY)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> str:
        answer = client.completions.create(model="tiny", prompt="x", seed=seed, max_tokens=24)
        return answer.choices[0].text

    assert ask(7) == ask(7) != ask(8)
    assert ask(-1) == ask(-1)
    assert ask(None) != ask(None), "no seed, temperature 1"


def test_defaults_are_openais(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="x", extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, extra_body={"ignore_eos": True}
    )
    assert chat.usage is not None and chat.usage.total_tokens == 512, "to the end of the context"


def test_top_k_of_one_is_greedy(client: openai.OpenAI, expected: list[str]) -> None:
    answer = client.completions.create(
        model="tiny", prompt=TEXTS[0], max_tokens=12, extra_body={"top_k": 1}
    )
    assert answer.choices[0].text == expected[0]


def test_prefixes_are_found_again_by_who_brings_the_same_salt(
    server: Any, client: openai.OpenAI
) -> None:
    prompt = list(range(100, 150))

    def hits(salt: str) -> int:
        before = server.health().json()["engine"]["prefix_hits"]
        extra = {"cache_salt": salt, "priority": -3}
        answer = client.completions.create(prompt=prompt, extra_body=extra, **GREEDY)
        texts.add(answer.choices[0].text)
        return int(server.health().json()["engine"]["prefix_hits"] - before)

    texts: set[str] = set()
    assert [hits(salt) for salt in ("salt a", "salt b", "salt a", "salt b")] == [0, 0, 48, 48]
    assert len(texts) == 1


def test_echo(client: openai.OpenAI, expected: list[str]) -> None:
    answer = client.completions.create(prompt=TEXTS[:2], echo=True, **GREEDY)
    assert [c.text for c in answer.choices] == [
        text + more for text, more in zip(TEXTS, expected[:2], strict=False)
    ]
    stream = client.completions.create(prompt=TEXTS[0], echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXTS[0] + expected[0]


def test_logprobs(client: openai.OpenAI, expected: list[str]) -> None:
    answer = client.completions.create(prompt=TEXTS[0], logprobs=3, **GREEDY)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
    assert "".join(found.tokens) == expected[0] and len(found.tokens) == 12
    assert all(value <= 0 for value in found.token_logprobs)
    for token, value, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == max(top.values()) == value, "greedy chose the likeliest"
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(12)]


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_an_answer_has_its_log_probability_too(
    server: Any, stream: bool
) -> None:
    """lm-eval takes the last one away, for it is of the token that it had to ask for."""
    ending = {**GREEDY, "stop_token_ids": [700], "logit_bias": {"700": 100}, "stream": stream}
    told = post(server, {**ending, "prompt": "a b c", "logprobs": 1, "echo": True, "max_tokens": 1})
    text = told.text.split("data: ")[1] if stream else told.text
    (choice,) = json.loads(text)["choices"]
    assert choice["text"] == "a b c" and choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["tokens"]) == 4
    assert choice["logprobs"]["token_logprobs"][-1] < 0


def test_chat_logprobs(client: openai.OpenAI) -> None:
    ask: Any = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, **GREEDY}
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].logprobs is not None
    found = answer.choices[0].logprobs.content
    assert found is not None and len(found) == 12
    assert "".join(entry.token for entry in found) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in found)
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **ask)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [e.token for e in streamed] == [e.token for e in found]


def test_echoed_logprobs_are_the_engines(
    client: openai.OpenAI, tiny_model: Path, default_artifact: Any
) -> None:
    """As lm-eval asks for them: prompts as tokens, one new token, streamed or not."""
    prompts = [default_artifact.tokenizer().encode(text) for text in TEXTS[:3]]
    ask: Any = {**GREEDY, "prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1}
    llm = LLM(read_artifact(tiny_model), EngineSettings(kv_blocks=64, dtype="float32"))
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, logprobs=1)
    wanted = llm.generate(prompts, params)
    answer = client.completions.create(**ask)
    streamed = {
        chunk.choices[0].index: chunk.choices[0].logprobs
        for chunk in client.completions.create(stream=True, **ask)
        if chunk.choices[0].logprobs is not None and chunk.choices[0].logprobs.tokens
    }
    for choice, prompt, made in zip(answer.choices, prompts, wanted, strict=True):
        found = choice.logprobs
        assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
        assert made.prompt_logprobs is not None and made.logprobs is not None
        entries = [*made.prompt_logprobs, *made.logprobs]
        assert len(found.tokens) == len(prompt) + 1 == len(found.top_logprobs)
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx([entry.logprob for entry in entries])
        assert all(len(top) in (1, 2) for top in found.top_logprobs[1:])
        assert "".join(found.tokens) == choice.text
        assert found.text_offset == [
            len("".join(found.tokens[:n])) for n in range(len(entries) + 1)
        ]
        told = streamed[choice.index]
        assert (told.tokens, told.text_offset) == (found.tokens, found.text_offset)
        # in other company: the same to float32's rounding, not to the bit
        assert told.token_logprobs == pytest.approx(found.token_logprobs, abs=1e-4)
        for once, again in zip(told.top_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert once == pytest.approx(again, abs=1e-4)


def test_several_answers_are_those_of_seeds_in_turn(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "max_tokens": 8}
    several = client.completions.create(prompt=TEXTS[:2], n=3, seed=5, **ask)
    assert [choice.index for choice in several.choices] == list(range(6))
    assert several.usage is not None and several.usage.completion_tokens <= 48
    for index, choice in enumerate(several.choices):
        alone = client.completions.create(prompt=TEXTS[index // 3], seed=5 + index % 3, **ask)
        assert choice.text == alone.choices[0].text
    assert len({choice.text for choice in several.choices}) == 6
    chat = client.chat.completions.create(messages=HELLO, n=2, seed=1, **ask)
    texts = ["", ""]
    for chunk in client.chat.completions.create(messages=HELLO, n=2, seed=1, stream=True, **ask):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.message.content for choice in chat.choices] == texts


def test_a_stop_string_ends_one_answer_of_several(server: Any, client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "prompt": TEXTS[0], "n": 2, "seed": 5, "max_tokens": 100}
    extra = {"ignore_eos": True}
    free = client.completions.create(extra_body=extra, **ask)
    first, second = (choice.text for choice in free.choices)
    stop = next(first[i : i + 4] for i in range(10, 90) if first[i : i + 4] not in second)
    cut = client.completions.create(extra_body=extra, stop=stop, **ask)
    assert [choice.finish_reason for choice in cut.choices] == ["stop", "length"]
    assert [choice.text for choice in cut.choices] == [first[: first.index(stop)], second]
    assert cut.usage is not None and cut.usage.completion_tokens < 200


def test_beams(client: openai.OpenAI, tiny_model: Path) -> None:
    llm = LLM(read_artifact(tiny_model), EngineSettings(kv_blocks=64, dtype="float32"))
    params = SamplingParams(max_tokens=8, temperature=0, n=3, beam_width=3)
    wanted = [completion.text for completion in llm.generate(TEXTS[0], params)]
    extra = {"use_beam_search": True}
    ask: Any = {"model": "tiny", "prompt": TEXTS[0], "n": 3, "max_tokens": 8, "extra_body": extra}
    assert [choice.text for choice in client.completions.create(**ask).choices] == wanted
    with pytest.raises(openai.BadRequestError, match="temperature must be 0"):
        client.completions.create(temperature=1, **ask)


def test_penalties_and_bias(client: openai.OpenAI, tiny_model: Path) -> None:
    llm = LLM(read_artifact(tiny_model), EngineSettings(kv_blocks=64, dtype="float32"))
    values: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    more = {"repetition_penalty": 1.2, "min_tokens": 5, "min_p": 0.1}
    bias = {500: 2.0, 7: -100.0}
    params = SamplingParams(
        12,
        temperature=0,
        logit_bias=tuple(bias.items()),
        **values,
        **more,  # type: ignore[arg-type]
    )
    answer = client.completions.create(
        prompt=TEXTS[0],
        logit_bias={str(token): value for token, value in bias.items()},
        extra_body=more,
        **values,
        **GREEDY,
    )
    assert answer.choices[0].text == llm.generate(TEXTS[0], params)[0].text
    with pytest.raises(openai.BadRequestError, match="logit_bias has a token that is not among"):
        client.completions.create(prompt="x", logit_bias={"49152": 1}, **GREEDY)
    always = client.completions.create(prompt="x", logit_bias={"500": 100}, **GREEDY)
    assert always.choices[0].text == llm.tokenizer.decode([500] * 12)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Alan"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_keep_to_a_schema(client: openai.OpenAI) -> None:
    """Even of a model of random weights, drawn hot."""
    told: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    ask: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "temperature": 1.5, "n": 4}
    answer = client.chat.completions.create(response_format=told, seed=0, **ask)
    assert len(answer.choices) == 4
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue  # white space without end is JSON too
        person = json.loads(choice.message.content or "")
        assert person.keys() == {"name", "age"} and person["name"] in ("Ada", "Alan")
    assert any(choice.finish_reason == "stop" for choice in answer.choices)


def test_answers_keep_to_regex_choice_and_grammar(client: openai.OpenAI) -> None:
    def ask(**structured: Any) -> tuple[str, str | None]:
        (choice,) = client.completions.create(
            model="tiny",
            prompt=TEXTS[0],
            max_tokens=30,
            seed=3,
            extra_body={"structured_outputs": structured},
        ).choices
        return choice.text, choice.finish_reason

    text, reason = ask(regex=r"\d{4}-\d{2}-\d{2}")
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) and reason == "stop"
    text, reason = ask(choice=['yes "sir"', "no, naïve", "может"])
    assert text in ('yes "sir"', "no, naïve", "может") and reason == "stop"
    text, reason = ask(grammar='start: "<" /[a-c]{3}/ ">"')
    assert re.fullmatch("<[a-c]{3}>", text) and reason == "stop"


@pytest.mark.parametrize(
    "bad",
    [
        {"regex": "(unclosed"},
        {"grammar": "start: nowhere"},
        {"json": {"type": "nonsense"}},
        {"json": "{not json"},
    ],
    ids=str,
)
def test_a_bad_grammar_is_refused_and_hurts_nobody(
    server: Any, client: openai.OpenAI, expected: list[str], bad: dict[str, Any]
) -> None:
    for stream in (False, True):
        body = {"prompt": "a", "structured_outputs": bad, "stream": stream}
        response = post(server, body)
        assert response.status_code == 400, response.text
        assert "is refused: " in response.json()["error"]["message"]
    assert client.completions.create(prompt=TEXTS[0], **GREEDY).choices[0].text == expected[0]


def test_the_model_card(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny" and client.models.retrieve("tiny") == card
    extra = card.model_extra or {}
    assert extra["max_model_len"] == 512 and extra["vocab_size"] == 49152
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.models.retrieve("other/model")


def test_health_has_the_counts(server: Any) -> None:
    body = server.health().json()
    assert body["status"] == "ok" and body["engine"]["blocks_total"] == 128


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"use_beam_search": True, "n": 2, "stop": "a"}, "stop"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": True, "n": 2, "length_penalty": 1e300}, "length_penalty"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        ({"prompt": [[1]] * 100, "n": 100}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": 3}, "stop"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [2**100]}, "prompt"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"top_k": 2**70}, "top_k"),
        ({"logprobs": 99}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chatty": 1}}, "stream_options.chatty"),
        ({"top_k": -2}, "top_k"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"stop": [str(n) for n in range(17)]}, "stop"),
        ({"stop": ["a", "x" * 257]}, "stop.1"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a" * 70_000]}}, "structured_outputs"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"a": "b" * 70_000}},
                }
            },
            "response_format",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_supported_is_refused_by_name(
    server: Any, change: dict[str, Any], param: str
) -> None:
    response = post(server, {"model": "tiny", "prompt": "a", **change})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] is not None and error["param"].startswith(param), error
    assert param.split(".")[0] in error["message"] or "prompt" in param
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=str,
)
def test_what_chat_does_not_support(server: Any, change: dict[str, Any], param: str) -> None:
    response = post(server, {"model": "tiny", "messages": HELLO, **change}, "/v1/chat/completions")
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].startswith(param), error


def test_labels_and_neutral_values_are_accepted(server: Any) -> None:
    neutral = {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "logit_bias": {}}
    plain = {"model": "tiny", "max_tokens": 1, "presence_penalty": 0, "frequency_penalty": 0.0}
    assert post(server, {"prompt": "a", **plain, **neutral, "suffix": None}).status_code == 200
    chat = {**plain, **neutral, "messages": HELLO, "tools": [], "response_format": {"type": "text"}}
    assert post(server, chat, "/v1/chat/completions").status_code == 200


def test_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"holds 512 tokens; you asked for 600") as bad:
        client.completions.create(model="tiny", prompt=[5] * 600)
    assert bad.value.code == "context_length_exceeded" and bad.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="500 in the prompt and 13 in the answer"):
        client.completions.create(model="tiny", prompt=[5] * 500, max_tokens=13)
    exact = client.completions.create(
        model="tiny", prompt=[5] * 500, max_tokens=12, extra_body={"ignore_eos": True}
    )
    assert exact.usage is not None and exact.usage.total_tokens == 512
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here; 'tiny' is"):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="holds 512 tokens"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "word " * 600}]
        )


@pytest.mark.parametrize("body", [b"{nonsense", b"", b"[1]", b'"text"', b"\xff\xfe", b"null"])
def test_bodies_that_are_no_json_object(server: Any, body: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"prompt": "a\ud800b"}', "prompt"),
        (rb'{"prompt": ["a", "\udc00"]}', "prompt"),
        (rb'{"prompt": "a", "model": "\ud800"}', "model"),
        (rb'{"prompt": "a", "user": {"\ud800": 1}}', "user"),
        (rb'{"prompt": "a", "\ud800": 1}', r"'\ud800'"),
    ],
)
def test_half_a_character_is_refused(server: Any, body: bytes, param: str) -> None:
    response = httpx.post(server.url + "/v1/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert "half a character" in response.json()["error"]["message"]
    whole = rb'{"prompt": "\ud83c\udf0d", "max_tokens": 1}'
    assert httpx.post(server.url + "/v1/completions", content=whole).status_code == 200


def test_a_body_without_its_content_type(server: Any) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert httpx.post(server.url + "/v1/completions", content=body).status_code == 200


def test_other_paths_and_methods(server: Any) -> None:
    for response in (httpx.get(server.url + "/v2"), httpx.get(server.url + "/v1/completions")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["message"].startswith("GET /v")


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("prompts", [1, 4])
def test_a_client_that_leaves_frees_its_blocks(server: Any, stream: bool, prompts: int) -> None:
    before = server.await_idle()["steps"]
    ask = {"prompt": [[5] * 64] * prompts, "max_tokens": 440, "ignore_eos": True, "stream": stream}
    body = json.dumps(ask).encode()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if stream:
            assert b"200" in connection.recv(100)
        server.await_running(prompts)
    steps = server.await_idle()["steps"]
    assert steps - before < 400, "it did not run to its end"
    time.sleep(0.1)
    assert server.health().json()["engine"]["steps"] == steps, "nothing runs on"
