"""The two sides of `infopt bench compare`: runs that lie there, or benches made in turn."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from infopt.core.bench.compare_inputs import find_runs
from infopt.core.errors import EngineError, InfoptError, UsageError
from infopt.core.progress import Progress, ProgressCallback

Paths = tuple[list[Path], list[Path]]
# What the comparison itself decides.
_OURS = ("--output", "-o", "--json", "--help", "--dry-run", "--recipe", "--yes", "-y")


def chosen_paths(words: Sequence[str], named: Paths) -> Paths:
    """The runs of both sides: two paths, or those of --a and --b."""
    if words and any(named):
        raise UsageError("A and B are named twice", "give them as words, or by --a and --b")
    if any(word.startswith("-") for word in words[2:]):
        raise UsageError(f"options of a bench without --run: {words[2]}", "--run makes benches")
    if len(words) != 2 and not all(named):
        raise UsageError("two sides are wanted", "name A and B, or give --a and --b")
    sides = named if not words else ([Path(words[0])], [Path(words[1])])
    a, b = ([run for path in side for run in find_runs(path)] for side in sides)
    if twice := {path.resolve() for path in a} & {path.resolve() for path in b}:
        raise UsageError(f"{min(twice)} is on both sides", "compare two runs")
    return a, b


def chosen_targets(words: Sequence[str], named: Paths) -> tuple[tuple[str, str], list[str]]:
    """Both targets of --run, and the options of their benches."""
    if any(named):
        raise UsageError("--a and --b name runs that were made", "name two targets with --run")
    if len(words) < 2 or any(word.startswith("-") for word in words[:2]):
        raise UsageError("--run wants two targets", "two URLs or models, then -- and options")
    for word in words[2:]:
        if (option := word.partition("=")[0]) in _OURS:
            raise UsageError(f"{option} is not for the benches of --run", "give it before --")
    return (words[0], words[1]), list(words[2:])


def bench_rounds(
    targets: tuple[str, str],
    options: Sequence[str],
    rounds: int,
    output: Path | None,
    *,
    replace: bool,
    progress: ProgressCallback,
) -> Paths:
    """Bench both targets in turn, A B A B, each in its own process; where they lie, by side."""
    if output is None:
        raise UsageError("--run wants --output DIR", "the benches of each round are kept there")
    found: Paths = ([], [])
    for number in range(1, rounds + 1):
        for side, target, runs in zip("ab", targets, found, strict=True):
            done = 2 * (number - 1) + (side == "b")
            progress(Progress("benching", done, 2 * rounds, f"round {number}, {side.upper()}"))
            folder = output / side / f"{number:02d}"
            _bench(target, options, folder, replace=replace)
            runs.append(folder)
    progress(Progress("benching", 2 * rounds, 2 * rounds))
    return found


def _bench(target: str, options: Sequence[str], folder: Path, *, replace: bool) -> None:
    whose = ["--url", target] if re.match(r"https?://", target) else ["--", target]
    words = ["bench", *options, "--quiet", "--output", str(folder)]
    command = [sys.executable, "-m", "infopt.cli.entry", *words, *(["--yes"] if replace else [])]
    done = subprocess.run([*command, *whose], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    told = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    message = told[-1].removeprefix("infopt: error: ")
    kind: type[InfoptError] = UsageError if done.returncode == 2 else EngineError
    raise kind(f"the bench of {target} failed: {message}")
