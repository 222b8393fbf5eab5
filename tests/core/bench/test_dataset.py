import json
from pathlib import Path

import pytest

from infopt.core.bench.dataset import read_dataset
from infopt.core.errors import UsageError

SHARE_GPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Because."},
        {"from": "human", "value": "And?"},
    ],
}


def written(folder: Path, content: object) -> Path:
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_of_conversations(tmp_path: Path) -> None:
    (entry,) = read_dataset(written(tmp_path, [SHARE_GPT]), chat=True)
    assert entry.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    )
    (plain,) = read_dataset(written(tmp_path, [SHARE_GPT]), chat=False)
    assert plain.prompt == "Why?" and plain.messages == ()


def test_lines_of_every_form(tmp_path: Path) -> None:
    lines = [
        {"prompt": "Tell me.", "output_tokens": 9},
        {"messages": [{"role": "user", "content": "Hello"}]},
        SHARE_GPT,
        {"conversations": [{"from": "gpt", "value": "Nobody asked."}]},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    entries = read_dataset(written(tmp_path, text), chat=True)
    assert [e.messages[-1]["content"] for e in entries] == ["Tell me.", "Hello", "Why?"]
    assert [e.output_tokens for e in entries] == [9, None, None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{oops", "line 1 is not JSON"),
        ("[{]", "is not JSON"),
        ([3], "entry 1 is no object"),
        ([{"question": "x"}], "entry 1 has no prompt, messages or conversations"),
        ([{"prompt": ""}], "prompt is not a text"),
        ([{"prompt": "x", "output_tokens": 0}], "output_tokens is 0"),
        ([{"prompt": "x", "output_tokens": "9"}], "output_tokens is '9'"),
        ([{"conversations": "x"}], "conversations is no list"),
        ([{"conversations": [{"from": "cat", "value": "x"}]}], "a turn has no from or value"),
        ([{"messages": [3]}], "a turn has no role or content"),
        ([{"conversations": [{"from": "gpt", "value": "x"}]}], "holds no question"),
        ("", "holds no question"),
    ],
    ids=str,
)
def test_what_has_no_form_is_told_by_its_place(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_dataset(written(tmp_path, content), chat=True)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_dataset(tmp_path / "none.json", chat=True)
