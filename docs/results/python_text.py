"""Write the default calibration text, and all docstrings of Python and of packages, as one text.

    python docs/results/python_text.py --output text.jsonl [--packages numpy torch ...]

One document a topic or module, in JSON lines. Paragraphs that the default evaluation text has, or
that an earlier document had, are left out: what is judged on is never trained on.
"""

import argparse
import ast
import importlib.util
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from infopt.core.text.standard_library import (
    calibration_documents,
    evaluation_documents,
    long_paragraphs,
)

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules(packages: list[str]) -> Iterator[Path]:
    """The library's files without its tests and vendored packages, then each package's."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.parts):
            yield file
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise SystemExit(f"no such package: {name}")
        files = sorted(Path(found.origin).parent.rglob("*.py"))
        yield from (file for file in files if not {"test", "tests"} & set(file.parts))


def prose(file: Path, taken: set[str]) -> str:
    """The paragraphs of a module's docstrings that are new; they count as taken from now on."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kept: list[str] = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        for part in (text or "").split("\n\n") if len(text or "") >= 200 else ():
            keys = long_paragraphs(part)
            if not keys & taken:
                taken |= keys
                kept.append(part.strip("\n"))
    return "\n\n".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--packages", nargs="*", default=[])
    given = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    taken = {key for text in evaluation_documents() for key in long_paragraphs(text)}
    documents = list(calibration_documents())
    taken.update(*map(long_paragraphs, documents))
    texts = (prose(file, taken) for file in modules(given.packages))
    documents += [text for text in texts if len(text) >= 400]
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    given.output.write_text("".join(lines), encoding="utf-8")
    print(f"{sum(map(len, documents)):,} characters, {len(documents):,} documents")


if __name__ == "__main__":
    main()
