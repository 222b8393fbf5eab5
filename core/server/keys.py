"""API keys: who may ask. Compared in constant time, named in metrics, kept as digests only."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infopt.core.errors import UsageError
from infopt.core.recipe.serve import KEYS_VARIABLE

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LEAST = 8
_OPTIONS = ("name", "rate", "concurrency")


@dataclass(frozen=True, slots=True)
class Key:
    """One client's key, and what it may do."""

    name: str
    digest: bytes
    """SHA-256 of the key."""
    rate: float | None = None
    """Requests a minute; None: what the server grants to all."""
    concurrency: int | None = None
    """Requests at a time; None: what the server grants to all."""

    def salt(self, asked: str) -> str:
        """What names this client's prefixes, within which it may divide further by `asked`.

        Derived from the key, so that no client can name another's (CVE-2025-46570).
        """
        return hmac.new(self.digest, b"prefix:" + asked.encode(), hashlib.sha256).hexdigest()


class Keys:
    """All keys of a server."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, word: str) -> Key | None:
        """The key that a client sent; as slow for a wrong one as for a right one."""
        digest, found = _digest(word), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> Keys | None:
    """The keys of a file, else of INFOPT_API_KEYS; None where there is neither: all may ask.

    The variable has lines as in a file, or divided by semicolons.
    Raises UsageError for a file that cannot be read, holds no key, or says what is none.
    """
    if path is not None:
        try:
            text = Path(path).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"cannot read the API keys in {path}: {reason}") from error
        return Keys(parse_keys(text, path))
    if text := environment.get(KEYS_VARIABLE, ""):
        return Keys(parse_keys(text.replace(";", "\n"), KEYS_VARIABLE))
    return None


def parse_keys(text: str, source: str) -> tuple[Key, ...]:
    """A key a line: `KEY [name=NAME] [rate=PER_MINUTE] [concurrency=N]`; # begins a comment.

    Raises UsageError that names source and line, and never a key.
    """
    found: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.split("#", 1)[0].split():
            found.append(_key(words, f"line {number} of {source}", f"key-{len(found) + 1}"))
    if not found:
        raise UsageError(f"there is no API key in {source}", "write one a line")
    for field in ("name", "digest"):
        if len({getattr(key, field) for key in found}) < len(found):
            what = "name" if field == "name" else "key"
            raise UsageError(f"two API keys of {source} have the same {what}")
    return tuple(found)


def _key(words: Sequence[str], where: str, name: str) -> Key:
    if len(words[0]) < _LEAST:
        raise UsageError(f"the API key in {where} is shorter than {_LEAST} characters")
    given = {"name": name}
    for word in words[1:]:
        option, _, value = word.partition("=")
        if option not in _OPTIONS or not value:
            known = ", ".join(f"{each}=" for each in _OPTIONS)
            raise UsageError(f"what follows the API key in {where} is none of {known}")
        given[option] = value
    if not _NAME.fullmatch(given["name"]):
        raise UsageError(f"the name of the API key in {where} may have letters, digits, _ . -")
    concurrency = _positive(given, "concurrency", where)
    if concurrency is not None and not concurrency.is_integer():
        raise UsageError(f"concurrency of the API key in {where} is no whole number")
    return Key(
        given["name"],
        _digest(words[0]),
        _positive(given, "rate", where),
        None if concurrency is None else int(concurrency),
    )


def _positive(given: Mapping[str, str], option: str, where: str) -> float | None:
    if option not in given:
        return None
    try:
        value = float(given[option])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{option} of the API key in {where} is no number above 0")
    return value


def _digest(word: str) -> bytes:
    return hashlib.sha256(word.encode(errors="surrogateescape")).digest()
