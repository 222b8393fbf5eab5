"""Text from the user's files."""

import json
from pathlib import Path
from typing import Any

from infopt.core.errors import UsageError

Conversation = tuple[dict[str, str], ...]


def read_plain(path: Path) -> str:
    """The whole of a UTF-8 text file; raises UsageError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def read_jsonl(path: Path) -> tuple[list[str], tuple[Conversation, ...] | None]:
    """The documents of a .jsonl file, one a line: {"text": ...} or {"messages": [{role, content}]}.

    Of conversations the contents are joined for use without a chat template, and the messages
    returned besides. All lines are of one kind. Raises UsageError naming file and line.
    """
    documents: list[str] = []
    conversations: list[Conversation] = []
    for number, line in enumerate(read_plain(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{where} is not JSON") from None
        if not isinstance(entry, dict):
            raise UsageError(f"{where} is no JSON table", _SHAPE)
        if "messages" in entry:
            conversations.append(_conversation(entry["messages"], where))
            documents.append("\n\n".join(message["content"] for message in conversations[-1]))
        elif isinstance(entry.get("text"), str):
            documents.append(entry["text"])
        else:
            raise UsageError(f'{where} has neither "text" nor "messages"', _SHAPE)
        if conversations and len(conversations) != len(documents):
            raise UsageError(f'{where} mixes "text" and "messages" in one file', _SHAPE)
    return documents, tuple(conversations) or None


_SHAPE = 'each line is {"text": "..."}, or {"messages": [{"role": "...", "content": "..."}]}'


def _conversation(messages: Any, where: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{where}: "messages" is no list of messages', _SHAPE)
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UsageError(f'{where}: a message needs "role" and "content"', _SHAPE)
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)
