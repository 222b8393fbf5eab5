"""What a bench wrote, read again; and what keeps two runs from being compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.core.errors import UsageError
from infopt.core.recipe.serve import EngineSettings
from infopt.core.reports.requests import RequestRecord, read_requests

REPORT = "report.json"
REQUESTS = "requests.jsonl"
# Who answers, and what is done with the figures after: all that two sides may differ in.
_OF_THE_TARGET = (set(EngineSettings.model_fields) - {"seed"}) | {
    "url",
    "engine",
    "api_key_env",
    "scrape",
    "price_per_hour",
    "attainment",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a bench: its report as plain JSON, and its requests at one level."""

    path: Path
    report: Mapping[str, Any]
    records: tuple[RequestRecord, ...]

    @property
    def load(self) -> dict[str, Any]:
        """The settings that make the load; empty where the report does not tell."""
        settings = (self.report.get("made") or {}).get("settings") or {}
        return {key: value for key, value in settings.items() if key not in _OF_THE_TARGET}

    @property
    def created(self) -> str:
        return str((self.report.get("made") or {}).get("created") or "")

    @property
    def limits(self) -> dict[str, float]:
        """Of latencies, in seconds."""
        return {str(key): float(value) for key, value in (self.report.get("slo") or {}).items()}


def read_report(path: Path) -> dict[str, Any]:
    """The report of a bench: its report.json, or the folder that holds it; raises UsageError."""
    file = path / REPORT if path.is_dir() else path
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read: {error.strerror}", "give a report.json of infopt bench"
        ) from error
    except ValueError as error:
        raise UsageError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("command") != "bench":
        raise UsageError(f"{file} is no report of infopt bench", "give one's report.json")
    return found


def find_runs(path: Path) -> list[Path]:
    """A bench's folder or report; of a folder that holds several such folders, all of them."""
    if not path.is_dir() or (path / REPORT).exists():
        return [path]
    found = sorted(each.parent for each in path.glob(f"*/{REPORT}"))
    if not found:
        raise UsageError(
            f"{path} holds no {REPORT}, nor do the folders in it",
            "give the --output of infopt bench",
        )
    return found


def read_run(path: Path, level: int | None = None) -> Run:
    """A run with its requests; of a sweep those of one level, by default the report's own."""
    report = read_report(path)
    file = (path if path.is_dir() else path.parent) / REQUESTS
    if not file.exists():
        raise UsageError(
            f"{file} is not there: a comparison needs every request",
            "infopt bench writes it with --output",
        )
    at = int(report.get("level") or 0) if level is None else level
    everything = tuple(read_requests(file))
    records = tuple(record for record in everything if record.level == at)
    if not records:
        known = ", ".join(str(one) for one in sorted({record.level for record in everything}))
        raise UsageError(f"{file} has no request of level {at}", f"there are: {known or 'none'}")
    if len({record.index for record in records}) < len(records):
        raise UsageError(f"{file} has a request twice", "it is not as infopt bench wrote it")
    return Run(path, report, records)


def objections(a: Sequence[Run], b: Sequence[Run], level: int | None) -> Iterator[str]:
    """Why two sides cannot be compared as they are; a line each."""
    if len(a) != len(b):
        yield f"{len(a)} runs of A and {len(b)} of B: a run without its partner"
    for run in (*a, *b):
        yield from _unsound(run, level)
    for one, other in zip(a, b, strict=False):
        name = f"{one.path} and {other.path}"
        yield from unlike(name, one, other)
        alone = len({r.index for r in one.records} ^ {r.index for r in other.records})
        if alone and not one.load.get("duration"):  # which ends where it ends
            yield f"{name}: {alone} requests have no partner on the other side"
    for first, *others in (a, b):
        for later in others:
            name = f"{first.path} and {later.path}, both of one side"
            yield from unlike(name, first, later, but=frozenset({"seed"}))


def _unsound(run: Run, level: int | None) -> Iterator[str]:
    at = int(run.report.get("level") or 0) if level is None else level
    levels = {entry.get("level"): entry for entry in run.report.get("levels") or ()}
    told = levels.get(at, run.report)
    if told.get("valid") is False:
        reasons = "; ".join(told.get("invalid_reasons") or ()) or "no reason told"
        yield f"{run.path} is no valid run: {reasons}"
    # Of a search for the capacity, the report counts what was asked; the requests are those sent.
    counted = int(told.get("completed") or 0) + int(told.get("failed") or 0)
    if counted != len(run.records):
        yield f"{run.path}: {counted} requests in the report, {len(run.records)} in {REQUESTS}"


def unlike(name: str, one: Run, other: Run, *, but: frozenset[str] = frozenset()) -> Iterator[str]:
    """The settings of the load in which two runs differ."""
    if not one.load or not other.load:
        return
    keys = sorted((set(one.load) | set(other.load)) - but)
    differing = [
        f"{key} ({one.load.get(key)} and {other.load.get(key)})"
        for key in keys
        if one.load.get(key) != other.load.get(key)
    ]
    if differing:
        yield f"{name}: the loads differ in {', '.join(differing)}"


def remarks(a: Sequence[Run], b: Sequence[Run]) -> Iterator[str]:
    """What the reader of a comparison must know of its runs."""
    if any(not run.load for run in (*a, *b)):
        yield "a report does not tell its settings: that the loads are alike is taken on trust"
    one, several = len(a) == 1, len(a) > 1
    if one:
        yield (
            "one run a side: what differs from run to run, such as a neighbour or the clock rate, "
            "is in no interval (--run interleaves several)"
        )
    if several and all(run.created for run in (*a, *b)):
        first, second = [run.created for run in a], [run.created for run in b]
        if max(first) < min(second) or max(second) < min(first):
            yield (
                "the runs of one side all came before those of the other: a machine that drifted "
                "meanwhile counts as a difference (--run interleaves them)"
            )
    if several and len(a) < 4:
        yield "fewer than four runs a side: what differs from run to run is in no interval"
