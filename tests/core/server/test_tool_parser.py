import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.server.tool_parser import (
    FORMS,
    MAX_DEPTH,
    CallPiece,
    CallReader,
    ForcedReader,
    Reader,
    head,
    read_call,
)

NAMES = ("add", "get_weather")
ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}]"}]}}'
RAIN = '{"arguments":{"city":"Zürich \\"x\\" \\ud83c"}, "name":"get_weather"}'
ADD_TOLD = ("add", '{"a": 1, "b": [2, {"c": "}]"}]}')
RAIN_TOLD = ("get_weather", '{"city":"Zürich \\"x\\" \\ud83c"}')
Told = tuple[str, list[tuple[str, str]]]


def read(reader: Reader, pieces: Sequence[str]) -> Told:
    """The content and the calls, put together as a client does."""
    content, calls = "", list[list[str]]()
    for text, found in [*map(reader.push, pieces), reader.finish()]:
        content += text
        for piece in found:
            if piece.name:
                assert piece.index == len(calls) and not piece.arguments, "the name comes first"
                calls.append([piece.name, ""])
            else:
                calls[piece.index][1] += piece.arguments
    return content, [(name, arguments) for name, arguments in calls]


def tag(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


CASES: list[tuple[str, str, Told]] = [
    ("hermes", tag(ADD), ("", [ADD_TOLD])),
    ("hermes", f"<tool_call>{ADD}</tool_call>", ("", [ADD_TOLD])),
    ("hermes", f"I see.\n\n{tag(ADD)}\n{tag(RAIN)}\n", ("I see.", [ADD_TOLD, RAIN_TOLD])),
    ("hermes", f"{tag(ADD)} and then", ("and then", [ADD_TOLD])),
    ("hermes", f"a {tag(ADD)} b {tag(RAIN)} c ", ("a b c ", [ADD_TOLD, RAIN_TOLD])),
    ("hermes", "no call <tool_cal", ("no call <tool_cal", [])),
    ("hermes", " a < b \n\n", (" a < b \n\n", [])),
    ("hermes", f"<tool_call>\n{ADD}", ("", [ADD_TOLD])),
    ("hermes", f"<tool_call>\n{ADD}\n</tool", ("", [ADD_TOLD])),
    ("hermes", f"<<tool_call>{ADD}</tool_call>>", ("<>", [ADD_TOLD])),
    # Malformed: all of it stays, and what follows is looked at again.
    ("hermes", tag(ADD[:-1]), (tag(ADD[:-1]), [])),
    ("hermes", tag(ADD + "}"), (tag(ADD + "}"), [])),
    ("hermes", tag("add(1)"), (tag("add(1)"), [])),
    ("hermes", tag("[1]"), (tag("[1]"), [])),
    ("hermes", f"<tool_call>{tag(ADD)}", ("<tool_call>", [ADD_TOLD])),
    ("hermes", f"<tool_call>{ADD}</tool_{tag(RAIN)}", (f"<tool_call>{ADD}</tool_", [RAIN_TOLD])),
    ("hermes", f" <tool_call>{{ {tag(ADD)}", (" <tool_call>{", [ADD_TOLD])),
    ("hermes", tag('{"name": "rm", "arguments": {}}'),
     (tag('{"name": "rm", "arguments": {}}'), [])),
    ("hermes", tag('{"name": "add"}'), (tag('{"name": "add"}'), [])),
    ("hermes", tag('{"name": "add", "arguments": "x"}'),
     (tag('{"name": "add", "arguments": "x"}'), [])),
    ("hermes", tag('{"name": "add", "arguments": {"a": NaN}}'),
     (tag('{"name": "add", "arguments": {"a": NaN}}'), [])),
    ("hermes", tag('{"name": ["add"], "arguments": {}}'),
     (tag('{"name": ["add"], "arguments": {}}'), [])),
    ("hermes", "<tool_call>" + "[" * 500, ("<tool_call>" + "[" * 500, [])),
    ("hermes", '<tool_call>{"name": "a\nb"', ('<tool_call>{"name": "a\nb"', [])),
    ("mistral", f"[TOOL_CALLS][{ADD}]", ("", [ADD_TOLD])),
    ("mistral", f"So: [TOOL_CALLS] [{ADD}, {RAIN}]\n", ("So:", [ADD_TOLD, RAIN_TOLD])),
    ("mistral", f"[TOOL_CALLS][{ADD}, ", (f"[TOOL_CALLS][{ADD}, ", [])),
    ("mistral", f"[TOOL_CALLS]{ADD}", (f"[TOOL_CALLS]{ADD}", [])),
    ("mistral", "[TOOL_CALLS][]", ("[TOOL_CALLS][]", [])),
    ("mistral", f"[TOOL_CALLS][{ADD}", ("", [ADD_TOLD])),
    ("llama3-json", '{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    ("llama3-json", f"\n{ADD}; {RAIN}\n", ("", [ADD_TOLD, RAIN_TOLD])),
    ("llama3-json", f"{ADD} is what I call", (f"{ADD} is what I call", [])),
    ("llama3-json", f"First {ADD}", (f"First {ADD}", [])),
    ("llama3-json", ' {"answer": 42} ', (' {"answer": 42} ', [])),
    ("llama3-json", "  ", ("  ", [])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "told"), CASES, ids=range(len(CASES)))
def test_what_is_a_call_and_what_is_content(form: str, text: str, told: Told) -> None:
    assert read(CallReader(FORMS[form], NAMES), [text]) == told
    assert read(CallReader(FORMS[form], NAMES), list(text)) == told


def split(text: str, cuts: list[int]) -> list[str]:
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


cuts = st.lists(st.integers(0, 10**6), max_size=12)
PARTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", ",", ";", " ", "\n", "{", "}"]
PARTS += [ADD, RAIN, '{"name": "add"', '"', "\\", "Grüße", "<tool", "<", '{"name": "rm"}', ADD[:20]]


@given(
    form=st.sampled_from(sorted(FORMS)),
    text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    single=st.booleans(),
    cuts=cuts,
)
def test_no_split_changes_anything(form: str, text: str, single: bool, cuts: list[int]) -> None:
    whole = read(CallReader(FORMS[form], NAMES, single=single), [text])
    assert read(CallReader(FORMS[form], NAMES, single=single), split(text, cuts)) == whole
    for name, arguments in whole[1]:
        assert name in NAMES and isinstance(json.loads(arguments), dict)


@given(text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
def test_without_calls_nothing_is_lost(text: str) -> None:
    for form in FORMS.values():
        content, calls = read(CallReader(form, NAMES), [text])
        if not calls:
            assert content == text


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=4)


@given(
    form=st.sampled_from(["hermes", "mistral"]),
    calls=st.lists(st.tuples(st.sampled_from(NAMES), objects), min_size=1, max_size=3),
    text=st.text("ab <[\n", max_size=8).map(lambda text: text.strip()),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    cuts=cuts,
)
def test_every_call_is_found_beside_any_text(
    form: str, calls: list[Any], text: str, indent: int | None, ascii: bool, cuts: list[int]
) -> None:
    written = [
        json.dumps({"name": name, "arguments": told}, indent=indent, ensure_ascii=ascii)
        for name, told in calls
    ]
    array = f"[TOOL_CALLS][{','.join(written)}]"
    body = "\n".join(map(tag, written)) if form == "hermes" else array
    content, found = read(CallReader(FORMS[form], NAMES), split(f"{text}\n{body}", cuts))
    assert content == text
    assert [(name, json.loads(told)) for name, told in found] == calls


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_single_call_ends_the_answer(form: str) -> None:
    text = {
        "hermes": f"So {tag(ADD)}{tag(RAIN)} more",
        "mistral": f"So [TOOL_CALLS][{ADD}, {RAIN}] more",
        "llama3-json": f"{ADD}; {RAIN}",
    }[form]
    reader = CallReader(FORMS[form], NAMES, single=True)
    over = next(n for n in range(len(text)) if reader.push(text[n]) and reader.is_over)
    assert text[: over + 1].endswith(ADD)
    content = "" if form == "llama3-json" else "So"
    again = CallReader(FORMS[form], NAMES, single=True)
    assert read(again, [text]) == (content, [ADD_TOLD]) and again.called


def forced(*calls: tuple[str, str]) -> str:
    whole = [f"{head(name)}{arguments}}}" for name, arguments in calls]
    return whole[0] if len(whole) == 1 else f"[{', '.join(whole)}]"


@given(calls=st.lists(st.tuples(st.sampled_from(NAMES), objects), min_size=1), cuts=cuts)
def test_forced_calls_are_told_as_they_come(calls: list[Any], cuts: list[int]) -> None:
    text = forced(*((name, json.dumps(told)) for name, told in calls))
    reader = ForcedReader(NAMES)
    content, found = read(reader, split(text, cuts))
    assert content == "" and reader.called
    assert [(name, json.loads(told)) for name, told in found] == calls


def test_forced_arguments_do_not_wait() -> None:
    reader = ForcedReader(NAMES)
    assert reader.push('[{"name": "add", "argum') == ("", ())
    assert reader.push('ents": {"a"') == (
        "",
        (CallPiece(0, "add"), CallPiece(0, arguments='{"a"')),
    )
    assert not reader.called, "it is half told"
    assert reader.push(": 1}}") == ("", (CallPiece(0, arguments=": 1}"),)) and reader.called
    assert reader.push(', {"name"') == ("", ()) and reader.finish() == ("", ())


def test_long_answers_are_read_in_linear_time() -> None:
    """Over texts on which a reader would choke if it looked back over what it holds."""
    began = time.perf_counter()
    for text in (" " * 50_000, "<tool_call>{" + '"' + "a" * 50_000, "<tool_call>{" * 5_000):
        read(CallReader(FORMS["hermes"], NAMES), [text[n : n + 4] for n in range(0, len(text), 4)])
    assert time.perf_counter() - began < 5


def test_calls_are_read_as_they_are_written() -> None:
    text = '{ "parameters" : {"a":1.0} , "x": [1,2], "name" : "add" }'
    assert read_call(text, NAMES) == ("add", '{"a":1.0}')
    assert read_call('{"name": "add", "arguments": {"a": 1,}}', NAMES) is None
    deep = '{"name": "add", "arguments": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}"
    assert read(CallReader(FORMS["llama3-json"], NAMES), [deep]) == (deep, [])
