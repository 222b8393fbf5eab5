import copy
import json
from typing import Any

import pytest

from infopt.core.recipe.serve import ToolParser
from infopt.core.server.chat import ChatMessage
from infopt.core.server.faults import ApiError
from infopt.core.server.render import as_text, form_of, marks_of, render, template_of
from infopt.core.server.tool_parser import FORMS
from infopt.core.server.tools import Tool

# In the manner of models' own, each with what tells its form.
QWEN = """{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
MISTRAL = QWEN.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
LLAMA = """{% if tools %}Environment: ipython {{ tools[0].function.name }}{% endif %}
{% for m in messages %}{{ m.role }}{% endfor %}"""
PLAIN = """{% for m in messages %}[{{ m.role }}] {{ m.content }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""

ADD = Tool.model_validate(
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object"}, "strict": True},
    }
).plain()
CALL: Any = {
    "id": "c1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": "ü"}'},
}
CHAT = [
    ChatMessage.model_validate(message).plain()
    for message in (
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Thanks."},
    )
]


def with_template(tokenizer: Any, template: Any) -> Any:
    found = copy.copy(tokenizer)
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "form"),
    [(QWEN, "hermes"), (MISTRAL, "mistral"), (LLAMA, "llama3-json"), (PLAIN, "hermes")],
)
def test_the_template_tells_the_form(template: str, form: str) -> None:
    assert form_of("auto", template) is FORMS[form]


@pytest.mark.parametrize("parser", ["hermes", "mistral", "llama3-json", "none"])
def test_unless_it_is_said(parser: ToolParser) -> None:
    assert form_of(parser, QWEN) is FORMS.get(parser)


def test_a_template_that_knows_tools_gets_them(tokenizer: Any) -> None:
    text = render(with_template(tokenizer, QWEN), CHAT, [ADD])
    assert text.startswith("<tools>{") and '"parameters": {"type": "object"}' in text
    assert "strict" not in text
    assert '[assistant] Hm.<tool_call>{"name": "add", "arguments": {"a": "ü"}}' in text
    assert "[tool] 1" in text and text.endswith("[assistant]")
    assert not render(with_template(tokenizer, QWEN), CHAT, [ADD], answered=False).endswith("]")
    assert "<tools>" not in render(with_template(tokenizer, QWEN), CHAT, [])


def test_one_that_does_not_gets_them_as_text(tokenizer: Any) -> None:
    lines = render(with_template(tokenizer, PLAIN), CHAT, [ADD]).split("\n[")
    roles = [line.lstrip("[").split("]")[0] for line in lines]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert lines[0].startswith("[system] Be kind.\n\n") and '{"name": "add", "para' in lines[0]
    assert lines[2].count('<tool_call>\n{"name": "add", "arguments": {"a": "ü"}}\n') == 2
    for content in "12":
        told = json.dumps({"name": "add", "content": content})
        assert f"<tool_response>\n{told}\n</tool_response>" in lines[3]


def test_the_description_of_tools_comes_first() -> None:
    told = as_text([{"role": "user", "content": "What?"}], [ADD])
    assert [message["role"] for message in told] == ["system", "user"]
    assert as_text(CHAT[:2], []) == CHAT[:2]


def test_tokenizers_with_several_templates(tokenizer: Any) -> None:
    both = with_template(tokenizer, {"default": PLAIN, "tool_use": QWEN})
    assert template_of(both, tools=True) == QWEN and template_of(both, tools=False) == PLAIN
    assert "<tools>" in render(both, CHAT, [ADD]) and "<tools>" not in render(both, CHAT, [])
    for none in (None, {"rag": PLAIN}):
        with pytest.raises(ApiError, match="no chat template"):
            template_of(with_template(tokenizer, none), tools=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must take turns') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[99].content.x }}",
        "{% for m in messages",
    ],
)
def test_a_template_that_fails_is_told_as_a_refusal(tokenizer: Any, template: str) -> None:
    with pytest.raises(ApiError, match="the chat template refuses") as refusal:
        render(with_template(tokenizer, template), CHAT[:2], [])
    assert refusal.value.status == 400


def test_marks_among_the_special_tokens(tokenizer: Any) -> None:
    marked = copy.deepcopy(tokenizer)
    assert marks_of(marked, FORMS["hermes"]) == {}
    marked.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<tool_call>"]})
    assert marks_of(marked, FORMS["hermes"]) == {
        "<tool_call>": marked.convert_tokens_to_ids("<tool_call>")
    }
    assert list(marks_of(marked, FORMS["mistral"])) == ["[TOOL_CALLS]"]
