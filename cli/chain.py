"""How the steps of a recipe follow each other: what each reads, writes and leaves."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.cli import bench, convert, distill, evaluate, profile, prune, quantize, serve
from infopt.cli.kept import kept, key_of, prepare, remember
from infopt.cli.options import Common
from infopt.cli.screen import Screen
from infopt.cli.verb import (
    PAGE,
    REPORT,
    Perform,
    Planner,
    Work,
    check_json_target,
    done,
    keep,
    opener,
    show,
    show_plan,
)
from infopt.core.errors import GateError
from infopt.core.recipe.recipe import WRITING, Recipe, Step, load_recipe
from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.run import RunReport, StepReport
from infopt.core.reports.schema import Plan, Report

if TYPE_CHECKING:
    from infopt.cli.serving import Server
    from infopt.core.artifact.read import Artifact

PERFORM: dict[str, Perform] = {
    "quantize": quantize.perform,
    "prune": prune.perform,
    "distill": distill.perform,
    "convert": convert.perform,
    "evaluate": evaluate.perform,
    "profile": profile.perform,
    "bench": bench.perform,
}
PLAN: dict[str, Planner] = {
    "quantize": quantize.plan,
    "prune": prune.plan,
    "distill": distill.plan,
    "convert": convert.plan_step,
    "evaluate": evaluate.plan,
    "profile": profile.plan,
    "serve": serve.plan,
    "bench": bench.plan,
}


@dataclass
class Chain:
    """A run in progress."""

    recipe: Recipe
    root: Path
    common: Common
    screen: Screen
    resume: bool
    outputs: dict[str, "Path | Artifact"] = field(default_factory=dict)
    """What earlier steps wrote, by name; while planning, the model that stands in for it."""
    newest: "Artifact | None" = None
    server: "Server | None" = None

    def open(self, word: str | None) -> "Artifact":
        """An earlier step's output by its name, else any model word."""
        found = self.outputs.get(word) if word is not None else None
        if found is None:
            return opener(self.screen, self.common)(word)
        if isinstance(found, Path):
            from infopt.core.artifact.read import read_artifact

            return read_artifact(found, trust_remote_code=self.common.trust_remote_code)
        return found

    def model(self, step: Step) -> "Artifact":
        """What a step reads: what it names, else the newest artifact, else the recipe's model."""
        if step.model is None and self.newest is not None:
            return self.newest
        return self.open(step.model or self.recipe.model)

    def work(self, number: int, step: Step) -> Work:
        """What step `number` (from 1) is handed."""
        changed: dict[str, Any] = {
            key: str(value) if isinstance(value, str) else value
            for key in ("device", "dtype", "seed")
            if (value := getattr(self.common, key)) is not None
            and key in type(step.settings).model_fields
        }
        elsewhere = getattr(step.settings, "url", None) or getattr(step.settings, "engine", None)
        if step.verb == "bench" and elsewhere is None and self.server:
            changed["url"] = self.server.url
        return Work(
            verb=step.verb,
            model=self.model(step),
            settings=step.settings.model_copy(update=changed),
            output=self.root / output_name(number, step) if step.verb in _FOLDERS else None,
            # Inside a run folder what a step wrote before is its own to replace.
            replace=self.common.yes or self.resume,
            resume=self.resume,
            screen=self.screen,
            open=self.open,
        )


_FOLDERS = (*WRITING, "bench")
"""Verbs whose step has a folder of its own: for what it writes, or for each request."""


def output_name(number: int, step: Step) -> str:
    return step.output or f"{number:02d}-{step.verb}"


def run_chain(path: Path, model: str | None, common: Common, *, resume: bool) -> None:
    """Run a recipe from the command line; a bound that is passed ends it, after the report."""
    recipe = load_recipe(path)
    check_json_target(common.json)
    if model is not None:
        recipe = recipe.model_copy(update={"model": model})
    root = common.output or Path(recipe.name)
    with Screen(quiet=common.quiet, json_on_stdout=common.json == "-") as screen:
        plan = _plan(Chain(recipe, root, common, screen, resume))
        if common.dry_run:
            show_plan(screen, plan, common.json)
            return
        prepare(root, anew=common.yes, resume=resume)
        report, gate = _all_steps(Chain(recipe, root, common, screen, resume))
        show(screen, report, common.json)
        screen.note(f"report: {root / REPORT}, {root / PAGE}")
        if gate is not None:
            raise gate


def _plan(chain: Chain) -> Plan:
    """The plans of all steps, each on the models at hand: what is yet to be written is as large.

    Every model that a step names is opened, so that a wrong word is told before the first step.
    """
    plans = []
    for number, step in enumerate(chain.recipe.steps, 1):
        work = chain.work(number, step)
        if baseline := getattr(step.settings, "baseline", None):
            chain.open(baseline)
        plans.append(PLAN[step.verb](work))
        if step.verb in WRITING:
            chain.outputs[output_name(number, step)] = chain.newest = work.artifact
    known = [plan.seconds for plan in plans if plan.seconds is not None]
    return Plan(
        command="run",
        actions=tuple(f"{plan.command}: {action}" for plan in plans for action in plan.actions),
        memory_bytes=max(plan.memory_bytes for plan in plans),
        disk_bytes=sum(plan.disk_bytes for plan in plans),
        seconds=sum(known) if len(known) == len(plans) else None,
    )


def _all_steps(chain: Chain) -> tuple[RunReport, GateError | None]:
    began, started = datetime.now(UTC), time.perf_counter()
    reports: list[StepReport] = []
    gate: GateError | None = None
    with ExitStack() as stack:
        for number, step in enumerate(chain.recipe.steps, 1):
            chain.screen.note(f"step {number} of {len(chain.recipe.steps)}: {step.verb}")
            try:
                reports.append(_one_step(chain, number, step, stack))
            except _Gated as gated:
                reports.append(gated.report)
                gate = gated.gate
                break
    return _whole(chain, tuple(reports), began, time.perf_counter() - started), gate


class _Gated(Exception):
    """A step was done, and passed a bound."""

    def __init__(self, report: StepReport, gate: GateError) -> None:
        self.report = report
        self.gate = gate


def _one_step(chain: Chain, number: int, step: Step, stack: ExitStack) -> StepReport:
    from infopt.core.reports.store import save

    work = chain.work(number, step)
    name, key = f"{number:02d}-{step.verb}.json", key_of(work)
    report = kept(chain.root, name, key, work) if chain.resume else None
    if report is None:
        if step.verb == "bench" and work.output is not None:
            work.output.mkdir(parents=True, exist_ok=True)
        report = _perform(chain, work, stack)
        keep(report, None)
        save(report, chain.root / name)
        remember(chain.root, name, key)
    else:
        chain.screen.note("kept from the interrupted run")
    show(chain.screen, report, None)
    if step.verb in WRITING:
        assert work.output is not None
        chain.outputs[output_name(number, step)] = work.output
        chain.newest = chain.open(output_name(number, step))
    output = None if work.output is None else str(work.output)
    told = StepReport(verb=step.verb, model=str(work.artifact.path), output=output, report=report)
    if isinstance(report, EvaluateReport):
        try:
            evaluate.check(report, work.settings)
        except GateError as gate:
            raise _Gated(told, gate) from None
    return told


def _perform(chain: Chain, work: Work, stack: ExitStack) -> Report:
    if work.verb != "serve":
        return done(PERFORM[work.verb], work)
    from infopt.cli.serving import Server, ask_all

    if chain.server is not None:
        chain.server.stop()
    log = chain.root / "serve.log"
    server = stack.enter_context(Server(work.artifact, work.settings, log))
    chain.server = server
    return done(lambda w: ask_all(server, w.artifact, w.settings), work)


def _whole(
    chain: Chain, steps: tuple[StepReport, ...], began: datetime, seconds: float
) -> RunReport:
    from infopt.core.reports.environment import making
    from infopt.core.reports.store import save, save_html

    whole = RunReport(
        recipe=chain.recipe.name,
        steps=steps,
        seconds=seconds,
        provenance={"seconds": "measured"},
        made=making(
            argv=tuple(sys.argv),
            settings=chain.recipe.model_dump(mode="json", exclude={"steps"}),
            created=began,
            seconds=seconds,
            device=chain.common.device or "auto",
        ),
    )
    save(whole, chain.root / REPORT)
    save_html(whole, chain.root / PAGE)
    return whole
