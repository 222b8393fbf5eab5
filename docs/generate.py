"""Write the pages that are drawn from the code: docs/map.md and docs/cli.md.

python docs/generate.py            write them
python docs/generate.py --check    exit 1 if they are out of date (`make lint`)
"""

import ast
import contextlib
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("cli", "core", "kernels")
FLOORS = """\
    cli                                                          words and screen
    quantization  pruning  distillation  conversion  evaluation  server  bench    one door a verb
    runtime  compression  training  profiling
    models
    layers  artifact  reports  text
    recipe  formats  hardware
    files
    errors  progress  libraries  kernels  recipes                           the ground
"""
HEAD = f"""\
# The map of the code

Drawn from the code by `python docs/generate.py`; do not edit.

An import less its leading `infopt.` is the file's path. Imports run downhill, and rooms on one
floor never import each other (`tests/test_architecture.py`):

{FLOORS}
"""
VERBS = (
    "quantize",
    "prune",
    "distill",
    "convert",
    "evaluate",
    "profile",
    "serve",
    "bench",
    "bench compare",
    "bench check",
    "bench kernels",
    "run",
    "doctor",
)


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.splitlines()[0] if text else ""


def draw_map() -> str:
    """Every room with its files, each with its first line."""
    folders = sorted({path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")})
    parts = [HEAD]
    for folder in folders:
        files = [f for f in sorted(folder.glob("*.py")) if f.name != "__init__.py"]
        about = folder / "__init__.py"
        parts.append(f"## {folder.relative_to(ROOT)}\n")
        if about.exists():
            parts.append(f"{first_line(about)}\n")
        if files:
            parts.append("| file | |\n|---|---|")
            parts += [
                f"| `{f.stem}` | {first_line(f).replace('|', chr(92) + '|')} |" for f in files
            ]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def draw_cli() -> str:
    """The help of every verb."""
    # The page must not depend on who draws it: plain help, 80 columns.
    os.environ |= {"NO_COLOR": "1", "COLUMNS": "80"}
    from infopt.cli.main import run_app

    parts = [
        "# The command line\n",
        "Drawn from the code by `python docs/generate.py`; do not edit.\n",
    ]
    for words in ([], *(verb.split() for verb in VERBS)):
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            run_app([*words, "--help"])
        parts.append(
            f"## {' '.join(['infopt', *words])}\n\n```text\n{screen.getvalue().rstrip()}\n```\n"
        )
    return "\n".join(parts)


def main() -> int:
    pages = {ROOT / "docs" / "map.md": draw_map(), ROOT / "docs" / "cli.md": draw_cli()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python docs/generate.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
