"""Tools through OpenAI's client: of scripted answers, and of a model of random weights."""

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from infopt.core.runtime.grammar import GrammarCompiler
from infopt.core.server.tool_parser import FORMS
from infopt.core.server.tools import (
    MAX_FORCED_CALLS,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    Tool,
    ToolUse,
)

HELLO: Any = [{"role": "user", "content": "What is 1 + 2, and is it raining?"}]
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"$ref": "#/$defs/small"},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"small": {"enum": [1, 2, 3]}},
        },
    },
}
RAIN: Any = {
    "type": "function",
    "function": {
        "name": "is_raining",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Zürich", "São Paulo", "東京"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, RAIN, NOW]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
CALL_2 = '<tool_call>\n{"name": "is_raining", "arguments": {"city": "Zürich"}}\n</tool_call>'
ASK: Any = {"model": "tiny", "messages": HELLO}
Chat = dict[str, Any]


def message_of(choice: Any) -> Chat:
    """A whole choice, without the ids of its calls."""
    calls = [
        (call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()
    ]
    ids = {call.id for call in choice.message.tool_calls or ()}
    assert len(ids) == len(calls) and all(
        call.type == "function" for call in choice.message.tool_calls or ()
    )
    reason = choice.finish_reason
    return {"content": choice.message.content or "", "calls": calls, "reason": reason}


def joined(chunks: list[Any]) -> dict[int, Chat]:
    """The choices that a stream adds up to; a call's name comes first, and once."""
    found: dict[int, Chat] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            told = found.setdefault(choice.index, {"content": "", "calls": [], "reason": None})
            assert told["reason"] is None, "nothing follows the reason"
            told["reason"] = choice.finish_reason
            told["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.type == "function" and call.index == len(told["calls"])
                    told["calls"].append([call.function.name, ""])
                assert call.id is not None or call.function.name is None
                told["calls"][call.index][1] += call.function.arguments
    for told in found.values():
        told["calls"] = [tuple(call) for call in told["calls"]]
    return found


def both_ways(app: Any, **ask: Any) -> list[Chat]:
    """The choices of an answer, which are those of the same answer streamed."""

    async def test(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> list[Chat]:
        whole = await client.chat.completions.create(**{**ASK, **ask})
        options = {"include_usage": True}
        stream = await client.chat.completions.create(
            stream=True, stream_options=options, **{**ASK, **ask}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        found = [message_of(choice) for choice in whole.choices]
        assert joined(chunks) == dict(enumerate(found))
        return found

    found: list[Chat] = app.run(test)
    return found


CASES: list[tuple[str, Chat]] = [
    (CALL, {"content": "", "calls": [("add", '{"a": 1, "b": 2}')], "reason": "tool_calls"}),
    (
        f"Let me see.\n{CALL}\n{CALL_2}",
        {
            "content": "Let me see.",
            "calls": [("add", '{"a": 1, "b": 2}'), ("is_raining", '{"city": "Zürich"}')],
            "reason": "tool_calls",
        },
    ),
    ("It is 3 < 4.", {"content": "It is 3 < 4.", "calls": [], "reason": "stop"}),
    (CALL[:-20], {"content": CALL[:-20], "calls": [], "reason": "stop"}),
    (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        {
            "content": '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
            "calls": [],
            "reason": "stop",
        },
    ),
]


@pytest.mark.parametrize(("text", "told"), CASES, ids=range(len(CASES)))
def test_calls_and_content(in_process: Callable[..., Any], text: str, told: Chat) -> None:
    assert both_ways(in_process(text), tools=TOOLS) == [told]
    assert both_ways(in_process(text), tools=TOOLS, tool_choice="auto", n=2) == [told] * 2
    plain = {"content": text, "calls": [], "reason": "stop"}
    assert both_ways(in_process(text), tools=TOOLS, tool_choice="none") == [plain]
    assert both_ways(in_process(text)) == [plain]


def test_each_of_several_answers_has_its_own_calls(in_process: Callable[..., Any]) -> None:
    first, second, third = both_ways(in_process(CALL, "No.", CALL_2), tools=TOOLS, n=3)
    assert [call[0] for call in first["calls"]] == ["add"] and second["content"] == "No."
    assert [call[0] for call in third["calls"]] == ["is_raining"]
    assert [x["reason"] for x in (first, second, third)] == ["tool_calls", "stop", "tool_calls"]


def test_an_answer_that_is_cut_off_says_so(in_process: Callable[..., Any]) -> None:
    (told,) = both_ways(in_process(f"{CALL}\n{CALL_2[:30]}", reason="length"), tools=TOOLS)
    assert told["reason"] == "length" and [call[0] for call in told["calls"]] == ["add"]
    assert told["content"].strip() == CALL_2[:30].strip()


def test_one_call_is_enough_without_parallel_calls(in_process: Callable[..., Any]) -> None:
    app = in_process(f"So: {CALL}\n{CALL_2}")
    (told,) = both_ways(app, tools=TOOLS, parallel_tool_calls=False)
    assert told["calls"] == [("add", '{"a": 1, "b": 2}')] and told["content"] == "So:"
    assert told["reason"] == "tool_calls"
    assert app.engine.given < 2 * len(app.engine.scripts[0]) - 20, "it is ended in the engine"


def test_other_forms(in_process: Callable[..., Any]) -> None:
    calls = '{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "now", "parameters": {}}'
    (told,) = both_ways(in_process(calls, tool_parser="llama3-json"), tools=TOOLS)
    assert told["calls"] == [("add", '{"a": 1, "b": 2}'), ("now", "{}")]
    calls = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    app = in_process(calls, tool_parser="mistral")
    assert both_ways(app, tools=TOOLS)[0]["calls"] == [("now", "{}")]

    async def call_id(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> str:
        answer = await client.chat.completions.create(tools=TOOLS, **ASK)
        return answer.choices[0].message.tool_calls[0].id  # type: ignore[index]

    assert len(in_process(calls, tool_parser="mistral").run(call_id)) == 9
    assert in_process(CALL).run(call_id).startswith("call_")


def test_forced_calls_come_in_pieces(in_process: Callable[..., Any]) -> None:
    text = '[{"name": "add", "arguments": {"a": 12, "b": 2}}, {"name": "now", "arguments": {}}]'
    app = in_process(text)
    told = {"content": "", "calls": [("add", '{"a": 12, "b": 2}'), ("now", "{}")]}
    assert both_ways(app, tools=TOOLS, tool_choice="required") == [{**told, "reason": "tool_calls"}]
    (_, params), _ = app.engine.asked
    assert params.grammar.kind == "lark" and f"{{0,{MAX_FORCED_CALLS - 1}}}" in params.grammar.text

    async def pieces(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> int:
        stream = await client.chat.completions.create(
            tools=TOOLS, tool_choice="required", stream=True, **ASK
        )
        return len([1 async for chunk in stream if chunk.choices[0].delta.tool_calls])

    assert in_process(text).run(pieces) > 6
    cut = in_process(text[:50], reason="length")
    (half,) = both_ways(cut, tools=TOOLS, tool_choice="required")
    assert half["reason"] == "length" and half["calls"][0][0] == "add"


def test_the_model_is_told_of_the_tools_and_of_the_calls_before(
    in_process: Callable[..., Any],
) -> None:
    app = in_process(CALL, "Three.")

    async def test(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        first = await client.chat.completions.create(tools=TOOLS, **ASK)
        message = first.choices[0].message
        result: Any = {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,  # type: ignore[index]
            "content": [{"type": "text", "text": "3"}],
        }
        chat: Any = [*HELLO, message, result]  # as it came, with all that it does not say
        await client.chat.completions.create(model="tiny", messages=chat, tools=TOOLS)
        tokens = await plain.post(
            "/tokenize", json={"messages": HELLO, "tools": TOOLS, "return_token_strs": True}
        )
        assert tokens.json()["tokens"] == app.engine.asked[0][0]

    app.run(test)
    first, second = (app.tokenizer.decode(prompt) for prompt, _ in app.engine.asked)
    for tool in TOOLS:
        assert f'"name": "{tool["function"]["name"]}"' in first
    assert "<tools>" in first and "Add two numbers." in first and "$defs" in first
    assert CALL not in first and CALL in second
    assert '<tool_response>\n{"name": "add", "content": "3"}\n</tool_response>' in second
    assert all(params.grammar is None for _, params in app.engine.asked)


STRICT: Any = {**RAIN, "function": {**RAIN["function"], "strict": True}}


@pytest.mark.parametrize("parser", ["auto", "llama3-json", "mistral"])
def test_strict_tools_bind_the_answer_by_a_grammar(
    in_process: Callable[..., Any], parser: str
) -> None:
    app = in_process("No.", tool_parser=parser)
    both_ways(app, tools=[ADD, STRICT])
    assert all(params.grammar.kind == "lark" for _, params in app.engine.asked)


@pytest.fixture(scope="module")
def marked(default_artifact: Any) -> Tokenizer:
    """A tokenizer with the marks of two forms among its special tokens."""
    found = Tokenizer.from_file(str(default_artifact.path / "tokenizer.json"))
    found.add_special_tokens([AddedToken("[TOOL_CALLS]"), AddedToken("<tool_call>")])
    return found


def test_marks_that_are_special_tokens_are_seen(in_process: Any, tokenizer: Any) -> None:
    """Others of the kind are left out of the text, as ever."""
    known = copy.deepcopy(tokenizer)
    known.add_special_tokens({"additional_special_tokens": ["<tool_call>", "[TOOL_CALLS]"]})
    assert len(known.encode("<tool_call>")) == 1
    app = partial(in_process.func, known)
    text = f"<|im_start|>So<|im_end|> <tool_call>{{ {CALL}"
    told = {"content": "So <tool_call>{", "calls": [("add", '{"a": 1, "b": 2}')]}
    assert both_ways(app(text), tools=TOOLS) == [{**told, "reason": "tool_calls"}]
    array = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    (found,) = both_ways(app(array, tool_parser="mistral"), tools=TOOLS)
    assert found["calls"] == [("now", "{}")] and found["content"] == ""


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
def test_what_the_grammar_of_strict_tools_lets_pass(
    default_artifact: Any, marked: Tokenizer, form: str, special: bool
) -> None:
    """Any text, and calls; of the strict tool only those that match its schema."""
    tokenizer = marked
    if not special:
        tokenizer = Tokenizer.from_file(str(default_artifact.path / "tokenizer.json"))
    mark = FORMS[form].mark
    ids = {mark: marked.token_to_id(mark)} if special and mark else {}
    tools = tuple(map(Tool.model_validate, (STRICT, ADD)))
    grammar = ToolUse(tools, forced=False, single=False, form=FORMS[form], mark_ids=ids).grammar()
    assert grammar is not None
    end = 2
    compiler = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), [end])

    def passes(text: str) -> bool:
        constraint = compiler.compile(grammar)
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            if not constraint.allowed()[token]:
                return False
            assert constraint.accept(token)
        return constraint.is_over or bool(constraint.allowed()[end])

    def written(*calls: str) -> str:
        match form:
            case "hermes":
                return "".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
            case "mistral":
                return f"[TOOL_CALLS][{', '.join(calls)}]"
        return "; ".join(calls)

    rain = '{"name": "is_raining", "arguments": {"city": "Zürich"}}'
    loose = '{"name": "add", "arguments": {"c": [1, 2]}}'
    for text in ("", "So it < is [ { a }", " So", written(rain), written(loose, rain)):
        assert passes(text), text
    for bad in (rain.replace("Zürich", "Bern"), rain.replace("is_raining", "rm"), rain[:-1]):
        assert not passes(written(bad)), bad
    if mark:
        assert passes(f"Let me see: {written(rain)} So.")


def deep(levels: int) -> Any:
    inner: Any = {"type": "integer"}
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


def tool(name: str = "f", **parameters: Any) -> Any:
    schema = {"type": "object", "properties": parameters}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def odd(schema: Any) -> Any:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


MESSAGES: Any = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        ],
    },
]
CALLED = MESSAGES[1]["tool_calls"][0]
NAMED: Any = {"type": "function", "function": {"name": "sub"}}

REFUSED: list[tuple[Chat, str]] = [
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
    ({"tools": "add"}, "tools"),
    ({"tools": [tool("two words")]}, "tools.0.function.name"),
    ({"tools": [tool("x" * 65)]}, "tools.0.function.name"),
    ({"tools": [tool(), tool("g"), tool()]}, "tools.2.function.name"),
    ({"tools": [{**ADD, "cost": 3}]}, "tools.0.cost"),
    ({"tools": [odd([1])]}, "tools.0.function.parameters"),
    ({"tools": [ADD, odd({"type": "string"})]}, "tools.1.function.parameters"),
    ({"tools": [odd({"anyOf": []})]}, "tools.0.function.parameters"),
    ({"tools": [tool(a={"type": "text"})]}, "tools.0.function.parameters"),
    ({"tools": [tool(a={"type": [[]]})]}, "tools.0.function.parameters"),
    ({"tools": [tool(a=3)]}, "tools.0.function.parameters"),
    ({"tools": [tool(a={"enum": []})]}, "tools.0.function.parameters"),
    ({"tools": [tool(a={"anyOf": {}})]}, "tools.0.function.parameters"),
    ({"tools": [tool(a={"required": "a"})]}, "tools.0.function.parameters"),
    ({"tools": [odd({"type": "object", "properties": []})]}, "tools.0.function.parameters"),
    ({"tools": [tool(a=deep(80))]}, "tools.0.function.parameters"),
    ({"tools": [tool(a={"default": deep(80)})]}, "tools.0.function.parameters"),
    ({"tools": [tool(f"f{n}") for n in range(MAX_TOOLS + 1)]}, "tools"),
    ({"tools": [tool(a={"title": "x" * MAX_TOOLS_BYTES})]}, "tools"),
    ({"tools": [tool(a={"$ref": "#/$defs/none"})], "tool_choice": "required"},
     "tools.0.function.parameters"),
    ({"tools": [tool(a={"pattern": "(", "type": "string"})], "tool_choice": "required"},
     "tools.0.function.parameters"),
    ({"tools": [ADD, tool(a={"multipleOf": 999_983})], "tool_choice": "required"},
     "tools.1.function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "auto", "tools": []}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tool_choice": NAMED, "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice"),
    ({"parallel_tool_calls": "yes", "tools": TOOLS}, "parallel_tool_calls"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "3"}]}, "messages.0.tool_call_id"),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "3", "tool_call_id": "b"}]},
     "messages.2.tool_call_id"),
    ({"messages": [*MESSAGES, {"role": "tool", "tool_call_id": "a"}]}, "messages.2.content"),
    ({"messages": [{**HELLO[0], "tool_calls": [CALLED]}]}, "messages.0.tool_calls"),
    ({"messages": [{**HELLO[0], "tool_call_id": "a"}]}, "messages.0.tool_call_id"),
    ({"messages": [{**HELLO[0], "name": "me"}]}, "messages.0.name"),
    ({"messages": [{**HELLO[0], "refusal": "no"}]}, "messages.0.refusal"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {**CALLED, "function": {"name": "add", "arguments": "[1]"}}]}]},
     "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {**CALLED, "function": {"name": "add", "arguments": "{"}}]}]},
     "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {**CALLED, "function": {"name": "add", "arguments": '{"a": "\\ud800"}'}}]}]},
     "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
     "messages.0.tool_calls.0.function"),
]  # fmt: skip


def test_what_does_not_work_is_refused_by_name(in_process: Callable[..., Any]) -> None:
    app = in_process("x")

    async def test(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        for change, param in REFUSED:
            response = await plain.post("/v1/chat/completions", json={**ASK, **change})
            error = response.json()["error"]
            assert response.status_code == 400, (change, response.text)
            assert error["param"] == param, (change, error)
            assert error["type"] == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="tool_choice needs tools"):
            await client.chat.completions.create(tool_choice="required", **ASK)

    app.run(test)
    assert not app.engine.asked


def test_a_server_that_looks_for_no_calls(in_process: Callable[..., Any]) -> None:
    async def test(client: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        with pytest.raises(openai.BadRequestError, match="--tool-parser none") as bad:
            await client.chat.completions.create(tools=TOOLS, **ASK)
        assert bad.value.param == "tool_choice"

    in_process(CALL, tool_parser="none").run(test)
    text = '{"name": "now", "arguments": {}}'
    (told,) = both_ways(in_process(text, tool_parser="none"), tools=TOOLS, tool_choice="required")
    assert told["calls"] == [("now", "{}")]


def check_call(name: str, text: str) -> None:
    """That arguments match their schema."""
    told = json.loads(text)
    match name:
        case "add":
            assert told.keys() == {"a", "b"} and 0 <= told["a"] <= 99 and told["b"] in (1, 2, 3)
        case "is_raining":
            assert told.keys() == {"city"} and told["city"] in ("Zürich", "São Paulo", "東京")
        case "now":
            assert told == {}
        case _:
            raise AssertionError(name)


HOT: Any = {**ASK, "temperature": 1.5, "max_tokens": 220}


def test_a_random_model_that_has_to_call_calls_well(client: openai.OpenAI) -> None:
    """Drawn hot; a stream of the same seed adds up to the same calls."""
    names = set()
    for seed in range(3):
        ask = {**HOT, "tools": TOOLS, "tool_choice": "required", "n": 3, "seed": seed}
        answer = client.chat.completions.create(**ask)
        whole = [message_of(choice) for choice in answer.choices]
        for told in whole:
            assert told["content"] == "" and 1 <= len(told["calls"]) <= MAX_FORCED_CALLS
            whole_calls = told["calls"]
            if told["reason"] == "length":  # of many calls, the last one is cut off
                whole_calls = whole_calls[:-1]
            else:
                assert told["reason"] == "tool_calls"
            for name, text in whole_calls:
                check_call(name, text)
                names.add(name)
        chunks = list(client.chat.completions.create(stream=True, **ask))
        assert joined(chunks) == dict(enumerate(whole))
    assert len(names) > 1


@pytest.mark.parametrize("name", ["add", "is_raining", "now"])
def test_a_random_model_calls_what_it_is_told_to(client: openai.OpenAI, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    answer = client.chat.completions.create(tools=TOOLS, tool_choice=choice, n=4, seed=1, **HOT)
    for told in map(message_of, answer.choices):
        ((called, text),) = told["calls"]
        assert called == name and told["reason"] == "tool_calls"
        check_call(called, text)


def test_log_probabilities_are_of_every_token(client: openai.OpenAI) -> None:
    """Of those that calls are made of as well."""
    ask = {**HOT, "tools": TOOLS, "tool_choice": "required", "seed": 1, "logprobs": True}
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == answer.usage.completion_tokens
    (told, *_) = message_of(answer.choices[0])["calls"]
    assert f'"name": "{told[0]}", "arguments": {told[1]}' in "".join(e.token for e in entries)
    streamed = [
        entry.token
        for chunk in client.chat.completions.create(stream=True, **ask)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == [entry.token for entry in entries]


def test_required_without_parallel_calls_is_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        tools=TOOLS, tool_choice="required", parallel_tool_calls=False, n=8, seed=2, **HOT
    )
    assert [len(choice.message.tool_calls or ()) for choice in answer.choices] == [1] * 8


def test_a_random_model_that_may_call_says_what_it_says(client: openai.OpenAI) -> None:
    ask: Any = {**HOT, "max_tokens": 40, "seed": 5, "tools": TOOLS}
    free = client.chat.completions.create(**ask)
    assert free.choices[0].message.content and free.choices[0].message.tool_calls is None
    chunks = list(client.chat.completions.create(stream=True, **ask))
    assert joined(chunks) == {0: message_of(free.choices[0])}
    strict = client.chat.completions.create(**{**ask, "tools": [STRICT]})
    assert strict.choices[0].message.content
