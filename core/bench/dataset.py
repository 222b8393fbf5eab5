"""Prompts and conversations out of a file, in the forms that they are passed around in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.core.bench.client import Message
from infopt.core.errors import UsageError

_FORMS = (
    'each entry is {"prompt": TEXT, "output_tokens": N}, {"messages": [...]} or '
    '{"conversations": [{"from": "human", "value": TEXT}, ...]}'
)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system", "chatgpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of a dataset: a text, or the messages of a chat."""

    prompt: str
    messages: tuple[Message, ...]
    output_tokens: int | None
    """None where the entry does not say."""


def read_dataset(path: Path, *, chat: bool) -> list[Entry]:
    """The usable entries of a JSON list or of JSON lines, in their order.

    Of a conversation all is sent up to its first answer. Raises UsageError naming the entry that
    has another form, and where nothing is left.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the dataset {path} cannot be read: {error}") from None
    entries = [_entry(path, n, found, chat) for n, found in enumerate(_parsed(path, text), 1)]
    usable = [entry for entry in entries if entry is not None]
    if not usable:
        raise UsageError(f"the dataset {path} holds no question", _FORMS)
    return usable


def _parsed(path: Path, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise UsageError(f"the dataset {path} is not JSON: {error}") from None
        assert isinstance(whole, list), "it begins with a bracket"
        return whole
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError:
                raise UsageError(f"{path}, line {number} is not JSON", _FORMS) from None
    return found


def _entry(path: Path, number: int, found: Any, chat: bool) -> Entry | None:
    """None for a conversation in which nobody asks anything."""
    where = f"{path}, entry {number}"
    if not isinstance(found, dict):
        raise UsageError(f"{where} is no object", _FORMS)
    tokens = found.get("output_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
        raise UsageError(f"{where}: output_tokens is {tokens!r}, not a whole number")
    if tokens is not None and tokens < 1:
        raise UsageError(f"{where}: output_tokens is {tokens}, not 1 or more")
    if "prompt" in found:
        if not isinstance(found["prompt"], str) or not found["prompt"]:
            raise UsageError(f"{where}: prompt is not a text", _FORMS)
        message = {"role": "user", "content": found["prompt"]}
        return Entry(found["prompt"], (message,) if chat else (), tokens)
    messages = _messages(where, found)
    asked = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        return None
    upto = messages[: asked[0] + 1]
    return Entry(upto[-1]["content"], tuple(upto) if chat else (), tokens)


def _messages(where: str, found: dict[str, Any]) -> list[dict[str, str]]:
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key not in found:
            continue
        turns = found[key]
        if not isinstance(turns, list):
            raise UsageError(f"{where}: {key} is no list", _FORMS)
        messages = []
        for turn in turns:
            said = turn.get(content) if isinstance(turn, dict) else None
            who = _ROLES.get(str(turn.get(role))) if isinstance(turn, dict) else None
            if not isinstance(said, str) or who is None:
                raise UsageError(f"{where}: a turn has no {role} or {content}", _FORMS)
            messages.append({"role": who, "content": said})
        return messages
    raise UsageError(f"{where} has no prompt, messages or conversations", _FORMS)
