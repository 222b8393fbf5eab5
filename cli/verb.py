"""What all verbs do alike: settings, the model, the report and where it goes."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.cli.options import Common
from infopt.cli.screen import Screen
from infopt.core.errors import RecipeError, UsageError
from infopt.core.recipe.base import Settings, validated
from infopt.core.recipe.recipe import WRITING, Step, find_recipe, load_recipe, settings_of
from infopt.core.reports.convert import ConvertReport
from infopt.core.reports.distill import DistillReport
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.prune import PruneReport
from infopt.core.reports.quantize import QuantizeReport
from infopt.core.reports.schema import Plan, Report

if TYPE_CHECKING:
    from infopt.core.artifact.read import Artifact


@dataclass(frozen=True)
class Work:
    """One verb's task, with everything it needs."""

    verb: str
    model: "str | Artifact | None"
    """The model's word, or the model."""
    settings: Any
    output: Path | None
    replace: bool
    resume: bool
    screen: Screen
    open: "Callable[[str | None], Artifact]"

    @cached_property
    def artifact(self) -> "Artifact":
        """The model, located when it is first wanted: not every verb wants one."""
        return (
            self.open(self.model)
            if self.model is None or isinstance(self.model, str)
            else self.model
        )


REPORT = "report.json"
PAGE = "report.html"
OF_ARTIFACTS = (
    QuantizeReport,
    PruneReport,
    DistillReport,
    MedusaReport,
    ConvertReport,
    KvHeadsReport,
)
"""The reports that lie in the artifact that they speak of."""
Perform = Callable[[Work], Report]
Planner = Callable[[Work], Plan]


def settings_for(
    verb: str, common: Common, given: Mapping[str, Any]
) -> tuple[Settings, Step | None]:
    """Settings of a verb: the recipe's, if one is named, overridden by the options given."""
    options = {key: value for key, value in given.items() if value is not None}
    step = _recipe_step(verb, common.recipe) if common.recipe else None
    # What follows from other settings is not taken over: the options may change those.
    base = step.settings.model_dump(mode="json", exclude_unset=True) if step else {}
    kind = settings_of(verb, {**base, **options})
    for key in ("device", "dtype", "seed"):
        if (value := getattr(common, key)) is not None and key in kind.model_fields:
            options[key] = value
    return validated(kind, _merged(base, options), "the command line"), step


def _recipe_step(verb: str, path: Path) -> Step:
    steps = [step for step in load_recipe(find_recipe(str(path))).steps if step.verb == verb]
    if len(steps) != 1:
        raise RecipeError(
            f"{path} has {len(steps) or 'no'} {verb} steps; one is wanted here",
            f"'infopt run {path}' runs a recipe of several steps",
        )
    return steps[0]


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings within are merged too."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def opener(screen: Screen, common: Common) -> "Callable[[str | None], Artifact]":
    """How model words become artifacts in this command."""

    def open_model(word: str | None) -> "Artifact":
        from infopt.core.artifact.locate import locate

        if word is not None and not word.strip():
            raise UsageError("MODEL is empty", "name a model, or leave it out for the default")
        return locate(word, progress=screen.progress, trust_remote_code=common.trust_remote_code)

    return open_model


def run_verb(
    verb: str,
    model: str | None,
    given: Mapping[str, Any],
    common: Common,
    perform: Perform,
    plan: Planner,
    *,
    resume: bool = False,
    after: Callable[[Report, Any], None] | None = None,
) -> None:
    """Do one verb from the command line; `after` may raise once the report has been shown."""
    writes = verb in WRITING
    verb = "quantize" if verb == "analyze" else verb
    settings, step = settings_for(verb, common, given)
    check_json_target(common.json)
    with Screen(quiet=common.quiet, json_on_stdout=common.json == "-") as screen:
        open_model = opener(screen, common)
        word = model if model is not None else (step.model if step else None)
        output = common.output or (Path(step.output) if step and step.output else None)
        work = Work(verb, word, settings, output, common.yes, resume, screen, open_model)
        if common.dry_run:
            show_plan(screen, plan(work), common.json)
            return
        if not writes:
            check_report_folder(output, replace=common.yes)
        report = done(perform, work)
        keep(report, output)
        show(screen, report, common.json)
        if after is not None:
            after(report, settings)


def done(perform: Perform, work: Work) -> Report:
    """Perform, and say how the report was made."""
    from infopt.core.reports.environment import making

    began, started = datetime.now(UTC), time.perf_counter()
    report = perform(work)
    made = making(
        argv=tuple(sys.argv),
        settings=work.settings.model_dump(mode="json"),
        created=began,
        seconds=time.perf_counter() - started,
        device=getattr(work.settings, "device", "auto"),
    )
    return report.model_copy(update={"made": made})


def keep(report: Report, folder: Path | None) -> None:
    """Lay the report of an artifact into it, any other into the folder that was asked for; the
    same as a page beside it."""
    from infopt.core.reports.store import save, save_html

    place = Path(report.output) if isinstance(report, OF_ARTIFACTS) else folder
    if place is not None:
        save(report, place / REPORT)
        save_html(report, place / PAGE)


def check_report_folder(folder: Path | None, *, replace: bool) -> None:
    """See that a report may be laid into `--output DIR`, before the work rather than after."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is not a folder", "name a folder")
    if (folder / REPORT).exists() and not replace:
        raise UsageError(f"{folder / REPORT} exists already", "--yes replaces it")


def check_json_target(target: str | None) -> None:
    """Refuse a place where no report can be written, before hours of work rather than after."""
    if target in (None, "-"):
        return
    path = Path(str(target))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(
            f"--json: cannot write a file at {path}", "name a file in an existing folder, or -"
        )


def show(screen: Screen, report: Report, json_target: str | None) -> None:
    """The summary for people, the JSON for scripts."""
    from infopt.cli.summary import summary
    from infopt.core.reports.store import save, to_json

    for warning in report.warnings:
        screen.warn(warning)
    screen.summary(summary(report))
    if json_target == "-":
        screen.json(to_json(report))
    elif json_target is not None:
        save(report, Path(json_target))


def show_plan(screen: Screen, plan: Plan, json_target: str | None) -> None:
    """What `--dry-run` says."""
    from infopt.cli.summary import plan_summary
    from infopt.core.reports.store import save, to_json

    screen.summary(plan_summary(plan))
    if json_target == "-":
        screen.json(to_json(plan))
    elif json_target is not None:
        save(plan, Path(json_target))
