"""Calls of tools in what a model writes: text in as it comes, content and calls out.

What comes out depends on the text alone, however it was cut into pieces.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

MAX_DEPTH = 64
"""Of brackets in a call: deeper ones are no call."""
_SPACE = " \t\n\r"
_SPACES = re.compile(r"[ \t\n\r]*")
_OUTSIDE_STRINGS = frozenset(_SPACE + '{}[]:,"+-.0123456789eE' + "truefalsn")


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls, each a JSON object with its name and its arguments."""

    mark: str
    """Comes before calls; without one, they are the whole answer."""
    opening: str = ""
    separator: str = ""
    """Between calls; without one, each has its own mark and end."""
    end: str = ""
    short_ids: bool = False
    """Templates of this form refuse ids of calls that have not nine characters."""

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.mark, self.end) if len(mark) > 1)


FORMS: dict[str, Form] = {
    "hermes": Form("<tool_call>", end="</tool_call>"),
    "mistral": Form("[TOOL_CALLS]", opening="[", separator=",", end="]", short_ids=True),
    "llama3-json": Form("", separator=";"),
}


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The name of the call `index`, or a piece of the text of its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


class Reader(Protocol):
    """Takes the text of one answer; hands out its content, and its calls."""

    is_over: bool
    """Whether nothing of the answer is wanted any more."""

    def push(self, text: str) -> tuple[str, tuple[CallPiece, ...]]: ...

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        """The rest: no more text comes."""
        ...

    @property
    def called(self) -> bool:
        """Whether there were calls, and none is half told."""
        ...


class _Brackets:
    """Follows JSON from its first bracket to the one that closes it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def step(self, char: str) -> Literal["going", "done", "bad"]:
        """By one character; "bad" where this cannot be JSON, though not everywhere."""
        if self._in_string:
            if char < " ":
                return "bad"
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return "going"
        if char not in _OUTSIDE_STRINGS:
            return "bad"
        match char:
            case '"':
                self._in_string = True
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
        if self._depth > MAX_DEPTH:
            return "bad"
        return "going" if self._depth else "done"


class CallReader:
    """Finds calls that a model may write, or not, in its `form`.

    What is no call of one of `names` with an object of arguments stays content, as it is written;
    so calls are told when they are complete. White space before a call, or with nothing else before
    or behind it, is no content. Where a `single` call is wanted, the answer is over with the first.
    """

    def __init__(self, form: Form, names: Collection[str], *, single: bool = False) -> None:
        self.is_over = False
        self._form = form
        self._names = names
        self._single = single
        self._state: Literal["text", "opening", "item", "object", "after", "plain"]
        self._state = "text" if form.mark else "item"
        self._held: list[str] = []
        """Characters: white space that may be beside a call, and a beginning of calls."""
        self._start = 0
        """Where in it the object begins that is being read."""
        self._brackets = _Brackets()
        self._closing = ""
        self._found: list[tuple[str, str]] = []
        self._told = 0
        self._spoke = False
        self._ended_call = False
        """Whether nothing was content since the last call."""
        self._content: list[str] = []
        self._calls: list[CallPiece] = []

    def push(self, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        for char in text:
            if not self.is_over:
                self._step(char)
        return self._take()

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        if self._state == "after":
            self._tell()
        else:
            rest = "".join(self._held)
            if rest.strip(_SPACE) or not self._ended_call:
                self._release(rest)
        self._held, self._state = [], "plain"
        return self._take()

    @property
    def called(self) -> bool:
        return self._told > 0

    def _take(self) -> tuple[str, tuple[CallPiece, ...]]:
        taken = "".join(self._content), tuple(self._calls)
        self._content, self._calls = [], []
        return taken

    def _step(self, char: str) -> None:
        if self._state == "plain":
            self._release(char)
            return
        self._held.append(char)
        match self._state:
            case "text":
                self._seek()
            case "object":
                self._read(char)
            case "opening" | "item" | "after" if char in _SPACE and not self._closing:
                pass
            case "opening" if char == self._form.opening:
                self._state = "item"
            case "item" if char == "{":
                self._state, self._start = "object", len(self._held) - 1
                self._brackets = _Brackets()
                self._brackets.step(char)
            case "after" if char == self._form.separator:
                self._state = "item"
            case "after" if self._form.end.startswith(self._closing + char):
                self._closing += char
                if self._closing == self._form.end:
                    self._tell()
            case _:
                self._fail()

    def _seek(self) -> None:
        """Look for the mark; what is neither it nor may come to stand beside it is content."""
        mark, held = self._form.mark, self._held
        tail = "".join(held[-len(mark) :])
        if tail == mark:
            self._state = "opening" if self._form.opening else "item"
            return
        kept = next(n for n in range(len(mark) - 1, -1, -1) if tail.endswith(mark[:n]))
        # Before the tail there is white space alone: other things did not stay.
        ends = range(len(held) - kept, max(0, len(held) - len(mark)), -1)
        sure = next((end for end in ends if held[end - 1] not in _SPACE), 0)
        self._release("".join(held[:sure]))
        del held[:sure]

    def _read(self, char: str) -> None:
        match self._brackets.step(char):
            case "bad":
                self._fail()
            case "done":
                call = read_call("".join(self._held[self._start :]), self._names)
                if call is None:
                    self._fail()
                    return
                self._found.append(call)
                self._state = "after"
                if self._single:
                    self._tell()
                    self.is_over = True

    def _tell(self) -> None:
        """The calls of the group are sound."""
        for name, arguments in self._found:
            self._calls.append(CallPiece(self._told, name))
            self._calls.append(CallPiece(self._told, arguments=arguments))
            self._told += 1
        self._ended_call = True
        self._again("text")

    def _fail(self) -> None:
        """They are not: all of it is content, but what the last character may begin."""
        text, last = "".join(self._held[:-1]), self._held[-1]
        self._again("text" if self._form.mark else "plain")
        sure = text.rstrip(_SPACE) if self._form.mark else text
        self._release(sure)
        self._held += text[len(sure) :]
        self._step(last)

    def _again(self, state: Literal["text", "plain"]) -> None:
        self._state, self._held, self._closing, self._found = state, [], "", []

    def _release(self, text: str) -> None:
        if self._ended_call and not self._spoke:
            text = text.lstrip(_SPACE)
        if text:
            self._spoke, self._ended_call = True, False
            self._content.append(text)


class ForcedReader:
    """Reads what a grammar makes an answer consist of: calls and nothing else, told as they come.

    A call begins with its `head`; after its arguments nothing matters until the next one.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.is_over = False
        self._heads = {head(name): name for name in names}
        self._held = ""
        self._brackets: _Brackets | None = None
        """Of the arguments that are being read."""
        self._told = 0

    def push(self, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        calls: list[CallPiece] = []
        arguments = ""
        for char in text:
            if self._brackets is None:
                self._held = self._held + char if self._held or char == "{" else ""
                if (name := self._heads.get(self._held)) is not None:
                    calls.append(CallPiece(self._told, name))
                    self._told += 1
                    self._held, self._brackets = "", _Brackets()
                continue
            arguments += char
            if self._brackets.step(char) == "done":
                self._brackets = None
                calls.append(CallPiece(self._told - 1, arguments=arguments))
                arguments = ""
        if arguments:
            calls.append(CallPiece(self._told - 1, arguments=arguments))
        return "", tuple(calls)

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        return "", ()

    @property
    def called(self) -> bool:
        return self._told > 0 and self._brackets is None


def head(name: str) -> str:
    """How a call begins that a grammar writes; its arguments and a `}` follow."""
    return f'{{"name": "{name}", "arguments": '


def read_call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """The name and the arguments, as they are written, of a call as a JSON object, if it is one."""
    try:
        whole = json.loads(text, parse_constant=_refuse)
    except ValueError:
        return None
    name = whole.get("name")
    parts = _members(text)
    arguments = parts.get("arguments") or parts.get("parameters") or ""
    known = isinstance(name, str) and name in names
    return (name, arguments) if known and arguments.startswith("{") else None


def _members(text: str) -> dict[str, str]:
    """The values of a JSON object as they are written; the text is known to be one."""
    decode, found = json.JSONDecoder().raw_decode, {}
    at = _skip(text, 1)
    while text[at] != "}":
        key, at = decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        at = decode(text, start)[1]
        found[key] = text[start:at]
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    assert found is not None
    return found.end()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
