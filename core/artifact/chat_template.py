"""Chat templates rendered as transformers renders them, without importing it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`generation` blocks mark what the model said, for those who train: here, as they stand."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_as_it_stands")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _as_it_stands(self, caller: Macro) -> str:
        return caller()


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    words: Mapping[str, Any],
    *,
    answered: bool,
) -> str:
    """The text of a conversation; with `answered` it ends where the answer begins.

    `words` are the special tokens by their names, and whatever else the template reads. Raises
    what a template raises: jinja2's TemplateError, or any error of its expressions.
    """
    return _compiled(template).render(
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=answered,
        **words,
    )


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    # A template comes with a model: it runs in a sandbox, over what it cannot change.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own writes what HTML wants.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
