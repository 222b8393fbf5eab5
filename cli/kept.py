"""What a run folder remembers so that a run can go on: which step was done, and from what."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infopt.cli.verb import Work
from infopt.core.errors import UsageError
from infopt.core.files import write_atomically
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.convert import ConvertReport
from infopt.core.reports.distill import DistillReport
from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.profile import ProfileReport
from infopt.core.reports.prune import PruneReport
from infopt.core.reports.quantize import QuantizeReport
from infopt.core.reports.schema import Report

STATE = "run.json"
_MARK = {"made_by": "infopt", "what": "a run"}
# A served step is done again: its server is gone.
KEPT: dict[str, tuple[type[Report], ...]] = {
    "quantize": (QuantizeReport,),
    "prune": (PruneReport,),
    "distill": (DistillReport, MedusaReport),
    "convert": (ConvertReport, KvHeadsReport),
    "evaluate": (EvaluateReport,),
    "profile": (ProfileReport,),
    "bench": (BenchReport,),
}


def prepare(root: Path, *, anew: bool, resume: bool) -> None:
    """Make the run folder ready; only one that a run made is ever written into again."""
    if anew and resume:
        raise UsageError("--resume and --yes contradict each other", "--yes does the run anew")
    if root.exists() and not root.is_dir():
        raise UsageError(f"--output {root} is not a folder", "name a folder")
    if root.is_dir() and any(root.iterdir()):
        if read_state(root) is None:
            raise UsageError(
                f"{root} is not empty, and no run of infopt made it", "choose another --output"
            )
        if not (anew or resume):
            raise UsageError(f"{root} holds a run", "--resume goes on with it, --yes does it anew")
        if anew:
            for step in root.glob("[0-9][0-9]-*.json"):
                step.unlink()
            (root / "report.json").unlink(missing_ok=True)
    if not resume or read_state(root) is None:
        _write_state(root, {})


def read_state(root: Path) -> dict[str, str] | None:
    """The keys of the steps done, by the names of their reports; None if this is no run folder."""
    try:
        content = json.loads((root / STATE).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("made_by") != _MARK["made_by"]:
        return None
    done = content.get("done")
    return {str(k): str(v) for k, v in done.items()} if isinstance(done, dict) else {}


def remember(root: Path, name: str, key: str) -> None:
    """Note that a step's report stands, and what it was made from."""
    _write_state(root, {**(read_state(root) or {}), name: key})


def kept(root: Path, name: str, key: str, work: Work) -> Report | None:
    """The report of this very step, made from the same things, if it can still be read."""
    if work.verb not in KEPT or (read_state(root) or {}).get(name) != key:
        return None
    if work.output is not None and not work.output.is_dir():
        return None
    for kind in KEPT[work.verb]:
        try:
            return kind.model_validate_json((root / name).read_bytes())
        except (OSError, ValidationError):
            continue
    work.screen.warn(f"{root / name} cannot be read: the step is done again")
    return None


def key_of(work: Work) -> str:
    """A digest of all that the step's result depends on: settings, model, baseline, text."""
    settings: dict[str, Any] = work.settings.model_dump(mode="json")
    calibration = settings.get("calibration")
    texts = [settings.get("text"), calibration.get("text") if calibration else None]
    parts: dict[str, Any] = {
        "verb": work.verb,
        "settings": settings,
        "model": _stamp(work.artifact.path),
        "teacher": _stamp(work.open(settings["teacher"]).path) if settings.get("teacher") else 0,
        "baseline": _stamp(work.open(settings["baseline"]).path) if settings.get("baseline") else 0,
        "texts": [_stamp(Path(text)) for text in texts if text and Path(text).exists()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a file, or of the files of a model that decide its answers."""
    files = (
        [path] if path.is_file() else [*sorted(path.glob("*.safetensors")), path / "config.json"]
    )
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _write_state(root: Path, done: dict[str, str]) -> None:
    write_atomically(root / STATE, json.dumps({**_MARK, "done": done}, indent=1) + "\n")
