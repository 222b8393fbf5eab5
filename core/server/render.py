"""A chat into the text that the model reads, tools and all, and the form in which it calls them."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError

from infopt.core.recipe.serve import ToolParser
from infopt.core.server.faults import ApiError
from infopt.core.server.tool_parser import FORMS, Form

Message = dict[str, Any]
# Templates are programs: on a chat that their authors did not foresee they fail in any way.
_FAULTS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, RecursionError)

_TOOLS = """You may call functions. These, described as JSON, are at hand:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON within tags, once for each call:
<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>"""
_READS_TOOLS = re.compile(r"\btools\b")


def template_of(tokenizer: Any, tools: bool) -> str:
    """The tokenizer's chat template; some have one of their own for tools.

    ApiError where there is none, or there are several and none is the default.
    """
    if tokenizer.chat_template:
        with suppress(ValueError):
            found: str = tokenizer.get_chat_template(tools=[{}] if tools else None)
            return found
    raise ApiError(
        400, "this model has no chat template: use /v1/completions", code="no_chat_template"
    )


def form_of(parser: ToolParser, template: str) -> Form | None:
    """How the model writes calls; None where nobody is to look for them."""
    match parser:
        case "none":
            return None
        case "hermes" | "llama3-json" | "mistral":
            return FORMS[parser]
    if not _READS_TOOLS.search(template):
        return FORMS["hermes"]  # as it is then told to
    if "[TOOL_CALLS]" in template:
        return FORMS["mistral"]
    if "<tool_call>" not in template and ("<|python_tag|>" in template or "ipython" in template):
        return FORMS["llama3-json"]
    return FORMS["hermes"]


def marks_of(tokenizer: Any, form: Form) -> dict[str, int]:
    """The marks of calls that are special tokens, and would be left out of texts as such."""
    added = tokenizer.added_tokens_decoder.items()
    return {str(token): n for n, token in added if token.special and str(token) in form.marks}


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], *, answered: bool = True
) -> str:
    """Messages through the model's template; ApiError where that refuses them.

    One that knows no tools gets their descriptions, calls and results as text. With `answered`, the
    text ends where the answer begins.
    """
    template = template_of(tokenizer, bool(tools))
    if not _READS_TOOLS.search(template):
        messages, tools = as_text(messages, tools), ()
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answered,
        )
    except _FAULTS as error:
        reason = " ".join(str(error).split())
        raise ApiError(
            400, f"the chat template refuses the messages: {reason}", param="messages"
        ) from error
    return text


def as_text(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The same chat in roles and texts alone: tools before all, their results from the user."""
    told: list[Message] = []
    names: dict[str, str] = {}
    results = False
    for message in messages:
        role, text = message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
            text = f"{text}\n{_call(call['function'])}" if text else _call(call["function"])
        if role == "tool":
            result = {"name": names[message["tool_call_id"]], "content": text}
            text = f"<tool_response>\n{_json(result)}\n</tool_response>"
            if results:  # many templates want the user and the assistant to take turns
                told[-1]["content"] += f"\n{text}"
                continue
            role = "user"
        results = message["role"] == "tool"
        told.append({"role": role, "content": text})
    if tools:
        about = _TOOLS.format(tools="\n".join(_json(tool["function"]) for tool in tools))
        if told[0]["role"] == "system":
            told[0]["content"] += f"\n\n{about}"
        else:
            told.insert(0, {"role": "system", "content": about})
    return told


def _call(function: Message) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{_json(call)}\n</tool_call>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
