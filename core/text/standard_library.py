"""Technical English that every Python has: pydoc's topics, and docstrings of the standard library.

The topics repeat one another (a chapter, and its sections again under names of their own), so a
split by name alone would leak. Paragraphs are therefore kept where they appear first only, and
topics go whole to one side.
"""

import ast
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# Shorter paragraphs (headings, 'Example:') say nothing that could leak.
_LONG = 60
# A topic that has less of its own than this is a section of another.
_OWN_SHARE = 0.5

# Modules with much prose. The topics alone do not fill 128 windows of 512 tokens on one side.
_MODULES = (
    "argparse.py",
    "ast.py",
    "asyncio/tasks.py",
    "codecs.py",
    "collections/__init__.py",
    "configparser.py",
    "difflib.py",
    "email/message.py",
    "fractions.py",
    "http/cookiejar.py",
    "inspect.py",
    "ipaddress.py",
    "json/__init__.py",
    "logging/__init__.py",
    "logging/handlers.py",
    "optparse.py",
    "os.py",
    "re/__init__.py",
    "shutil.py",
    "smtplib.py",
    "socketserver.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
    "textwrap.py",
    "threading.py",
    "traceback.py",
    "typing.py",
    "urllib/parse.py",
    "zipfile.py",
)


def calibration_documents() -> tuple[str, ...]:
    """Half of the topics, and the docstrings."""
    topics, _ = _split_topics()
    taken = {key for text in (*topics, *evaluation_documents()) for key in long_paragraphs(text)}
    documents = list(topics)
    for text in _docstrings():
        own = _without(text, taken)
        taken.update(long_paragraphs(own))
        if own:
            documents.append(own)
    return tuple(documents)


def evaluation_documents() -> tuple[str, ...]:
    """The other half of the topics."""
    return _split_topics()[1]


def long_paragraphs(text: str) -> set[str]:
    """The paragraphs that are long enough to recognize, whitespace made plain."""
    plain = (" ".join(part.split()) for part in text.split("\n\n"))
    return {part for part in plain if len(part) >= _LONG}


@cache
def _split_topics() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two sides of about the same size; every long paragraph appears once in all."""
    from pydoc_data.topics import topics

    taken: set[str] = set()
    sides: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    # Longest first, so that the chapter is kept and its sections go; then each to the smaller side.
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        own = _without(text, taken)
        if len(own) < _OWN_SHARE * len(text.strip()):
            continue
        taken |= long_paragraphs(own)
        side = 0 if sizes[0] <= sizes[1] else 1
        sides[side].append(own)
        sizes[side] += len(own)
    return tuple(sides[0]), tuple(sides[1])


def _without(text: str, taken: set[str]) -> str:
    kept: list[str] = []
    seen = set(taken)
    for part in text.strip("\n").split("\n\n"):
        plain = " ".join(part.split())
        if len(plain) >= _LONG:
            if plain in seen:
                continue
            seen.add(plain)
        kept.append(part)
    return "\n\n".join(kept).strip()


@cache
def _docstrings() -> tuple[str, ...]:
    """One document a module, read from its source; modules that are not there are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (root / module for module in _MODULES)
    return tuple(text for file in files if file.is_file() and (text := _docstrings_of(file)))


def _docstrings_of(file: Path) -> str:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes: Iterable[ast.AST] = ast.walk(ast.parse(file.read_bytes()))
    found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    return "\n\n".join(text.strip() for text in found if text and len(text) >= 200)
