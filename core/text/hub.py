"""Text from a data set of the Hugging Face hub."""

import itertools
from dataclasses import dataclass
from typing import Any

from infopt.core.errors import MissingExtraError, ResourceError, UsageError

# Enough for any calibration or perplexity; a whole C4 is not wanted.
_MAX_CHARACTERS = 20_000_000
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class HubText:
    """The parts of `hub:NAME[/CONFIG]:SPLIT:COLUMN`."""

    name: str
    config: str | None
    split: str
    column: str


def parse_hub(source: str) -> HubText:
    """NAME is `owner/name`, or one word for the oldest data sets; raises UsageError."""
    parts = source.removeprefix("hub:").split(":")
    slashes = parts[0].split("/")
    if len(parts) != 3 or not all(parts) or len(slashes) > 3 or not all(slashes):
        raise UsageError(
            f"{source!r} names no data set",
            "write hub:NAME[/CONFIG]:SPLIT:COLUMN, such as"
            " hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text",
        )
    config = slashes[2] if len(slashes) == 3 else None
    return HubText("/".join(slashes[:2]), config, parts[1], parts[2])


def read_hub(source: str) -> tuple[list[str], str | None]:
    """The column's texts in order, at most 20 million characters, and the licence if stated.

    Raises MissingExtraError without `datasets`, ResourceError where the hub cannot be reached.
    """
    wanted = parse_hub(source)
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtraError("datasets", "eval") from None
    try:
        # load_dataset waits long for a hub that is silent, so it is asked first here.
        HfApi().dataset_info(wanted.name, timeout=_TIMEOUT_S)
        stream = load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
        return _collect(stream, wanted.column, source), _licence(stream)
    except UsageError:
        raise
    except Exception as error:  # every kind of network, name and data fault comes this way
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise ResourceError(
            f"cannot load {source}: {reason}", "see that the hub is reachable and the name right"
        ) from error


def _collect(stream: Any, column: str, source: str) -> list[str]:
    documents: list[str] = []
    size = 0
    for row in stream:
        if not isinstance(row.get(column), str):
            known = ", ".join(str(key) for key in itertools.islice(row, 20))
            raise UsageError(f"{source} has no text column {column!r}", f"its columns: {known}")
        if row[column].strip():
            documents.append(row[column])
            size += len(row[column])
        if size > _MAX_CHARACTERS:
            break
    return documents


def _licence(stream: Any) -> str | None:
    found = getattr(getattr(stream, "info", None), "license", None)
    return str(found) if found else None
