"""Tools that a chat may call: what clients say of them, and what answers then have to match."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infopt.core.errors import UsageError
from infopt.core.runtime.grammar import Grammar
from infopt.core.server.faults import ApiError
from infopt.core.server.schemas import OBJECT, compact, refusal, schema_fault
from infopt.core.server.structured import Schema, refused
from infopt.core.server.tool_parser import CallReader, ForcedReader, Form, Reader, head

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 64 * 1024
"""Of all tools of a request, as JSON."""
MAX_FORCED_CALLS = 16
"""In one answer that has to call: a weak model would go on to its last token."""
NOTHING: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(BaseModel):
    """OpenAI's function; without `parameters` it takes none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> Schema:
        """Of its arguments."""
        return NOTHING if self.parameters is None else self.parameters or OBJECT


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it; `strict` is not for the model."""
        told = self.function.model_dump(include={"name", "description"}, exclude_none=True)
        return {"type": "function", "function": {**told, "parameters": self.function.schema_}}


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedTool(BaseModel):
    """The one function to call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raise what a validator raises, naming the field, for what does not fit together."""
    if not tools and choice not in (None, "none"):
        raise refused("tool_choice", "needs tools")
    names = [tool.function.name for tool in tools]
    for index, tool in enumerate(tools):
        where = f"tools.{index}.function"
        if names[index] in names[:index]:
            raise refused(f"{where}.name", f"is {names[index]!r} once more")
        if fault := schema_fault(tool.function.schema_):
            raise refused(f"{where}.parameters", fault)
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise refused("tool_choice", f"names {choice.function.name!r}, which is not among tools")
    size = len(json.dumps([tool.plain() for tool in tools], ensure_ascii=False).encode())
    if size > MAX_TOOLS_BYTES:
        raise refused("tools", f"have {size:,} bytes: at most {MAX_TOOLS_BYTES:,}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses its tools."""

    tools: tuple[Tool, ...]
    forced: bool
    """Whether answers are calls and nothing else."""
    single: bool
    form: Form
    """In which the model writes what it may write or not."""
    mark_ids: dict[str, int] = field(default_factory=dict)
    """Special tokens among the form's marks."""

    def reader(self) -> Reader:
        names = frozenset(tool.function.name for tool in self.tools)
        if self.forced:
            return ForcedReader(names)
        return CallReader(self.form, names, single=self.single)

    @property
    def is_bound(self) -> bool:
        """Whether a grammar holds the arguments of calls to their schemas."""
        return self.forced or any(tool.function.strict for tool in self.tools)

    def grammar(self) -> Grammar | None:
        """What the answer has to match; ApiError where that cannot be said."""
        if not self.is_bound:
            return None
        try:
            return Grammar("lark", self._forced() if self.forced else self._free())
        except UsageError as error:
            raise ApiError(400, f"tools: {error.message}", param="tools") from error

    def check_schemas(self) -> None:
        """Raise ApiError for a schema that a grammar is to be made of and cannot."""
        for index, tool in enumerate(self.tools):
            bound = self.forced or tool.function.strict
            if bound and (fault := refusal(tool.function.schema_)):
                param = f"tools.{index}.function.parameters"
                raise ApiError(400, f"{param} {fault}", param=param, code="unsupported_value")

    def _forced(self) -> str:
        more = f' | "[" call (", " call){{0,{MAX_FORCED_CALLS - 1}}} "]"'
        return f"start: call{'' if self.single else more}\n{self._calls()}"

    def _free(self) -> str:
        """Any text, and calls wherever one is begun."""
        form, calls = self.form, self._calls()
        if not form.mark:
            more = "" if self.single else f' ("{form.separator} " call)*'
            return f"start: TEXT? | call{more}\nTEXT: /[ \\n]*[^{{ \\n](.|\\n)*/\n{calls}"
        again = "" if self.single or not form.separator else f' ("{form.separator} " call)*'
        begin, end = (_literal(part) for part in _spaced(form))
        mark = form.mark
        if (token := self.mark_ids.get(mark)) is not None:
            found = f"found: TEXT <[{token}]>"
        else:
            found = f"found[lazy]: TEXT {_literal(mark)}"
        repeat = "?" if self.single else "*"
        return (
            f"start: (found {begin} call{again} {end}){repeat} rest\nrest: TEXT\n"
            f"TEXT: /(.|\\n)*/\n{found}\n{calls}"
        )

    def _calls(self) -> str:
        """A rule `call` for one of them, written as `tool_parser.head` begins it."""
        rules = [f"call: {' | '.join(f'call_{n}' for n in range(len(self.tools)))}"]
        for n, tool in enumerate(self.tools):
            bound = self.forced or tool.function.strict
            schema = json.dumps(compact(tool.function.schema_ if bound else OBJECT))
            rules.append(f'call_{n}: {_literal(head(tool.function.name))} args_{n} "}}"')
            rules.append(f"args_{n}: %json {schema}")
        return "\n".join(rules)


def _spaced(form: Form) -> tuple[str, str]:
    """What stands between a mark and its calls, and behind those, as models write it."""
    return (form.opening, form.end) if form.opening else ("\n", f"\n{form.end}")


def _literal(text: str) -> str:
    """Of Lark."""
    return json.dumps(text, ensure_ascii=False)
