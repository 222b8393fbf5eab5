"""How the steps of a recipe follow each other: what each reads, writes and leaves."""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.cli import bench, evaluate, profile, quantize, serve
from infopt.cli.options import Common
from infopt.cli.screen import Screen
from infopt.cli.verb import (
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
from infopt.core.errors import UsageError
from infopt.core.recipe.recipe import WRITING, Recipe, Step, load_recipe
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.profile import ProfileReport
from infopt.core.reports.quantize import QuantizeReport
from infopt.core.reports.run import RunReport, StepReport
from infopt.core.reports.schema import Plan, Report

if TYPE_CHECKING:
    from infopt.cli.serving import Server
    from infopt.core.artifact.read import Artifact

PERFORM: dict[str, Perform] = {
    "quantize": quantize.perform,
    "evaluate": evaluate.perform,
    "profile": profile.perform,
    "bench": bench.perform,
}
PLAN: dict[str, Planner] = {
    "quantize": quantize.plan,
    "evaluate": evaluate.plan,
    "profile": profile.plan,
    "serve": serve.plan,
    "bench": bench.plan,
}
# A served step is done again on --resume: its server is gone.
KEPT: dict[str, type[Report]] = {
    "quantize": QuantizeReport,
    "evaluate": EvaluateReport,
    "profile": ProfileReport,
    "bench": BenchReport,
}


@dataclass
class Chain:
    """A run in progress."""

    recipe: Recipe
    root: Path
    common: Common
    screen: Screen
    resume: bool
    outputs: dict[str, Path] = field(default_factory=dict)
    newest: "Artifact | None" = None
    server: "Server | None" = None

    def open(self, word: str | None) -> "Artifact":
        """An earlier step's output by its name, else any model word."""
        if word in self.outputs:
            from infopt.core.artifact.read import read_artifact

            return read_artifact(self.outputs[word])
        return opener(self.screen, self.common)(word)

    def work(self, number: int, step: Step) -> Work:
        """What step `number` (from 1) is handed."""
        changed: dict[str, Any] = {
            key: value
            for key in ("device", "dtype", "seed")
            if (value := getattr(self.common, key)) is not None
            and key in type(step.settings).model_fields
        }
        if step.verb == "bench" and getattr(step.settings, "url", None) is None and self.server:
            changed["url"] = self.server.url
        settings = type(step.settings).model_validate({**step.settings.model_dump(), **changed})
        model = step.model or self.newest or self.recipe.model
        output = (
            self.root / (step.output or f"{number:02d}-{step.verb}")
            if step.verb in WRITING
            else None
        )
        resume = self.resume and step.verb in WRITING and not self.common.yes
        return Work(
            step.verb, model, settings, output, self.common.yes, resume, self.screen, self.open
        )

    def kept(self, number: int, work: Work) -> Report | None:
        """The report of this very step from an earlier, interrupted run."""
        file = self.root / f"{number:02d}-{work.verb}.json"
        if not self.resume or work.verb not in KEPT or not file.exists():
            return None
        values = json.loads(file.read_text())
        same = values["made"]["settings"] == work.settings.model_dump(mode="json")
        whole = work.output is None or work.output.is_dir()
        if same and whole and values["model"]["path"] == str(work.artifact.path):
            return KEPT[work.verb].model_validate(values)
        return None


def run_chain(path: Path, model: str | None, common: Common, *, resume: bool) -> None:
    """Run a recipe from the command line."""
    recipe = load_recipe(path)
    check_json_target(common.json)
    if model is not None:
        recipe = recipe.model_copy(update={"model": model})
    root = common.output or Path(recipe.name)
    with Screen(quiet=common.quiet, json_on_stdout=common.json == "-") as screen:
        chain = Chain(recipe, root, common, screen, resume)
        if common.dry_run:
            show_plan(screen, _plan(chain), common.json)
            return
        _prepare(root, common, resume)
        report = _all_steps(chain)
        show(screen, report, common.json)
        screen.note(f"report: {root / 'report.json'}")


def _prepare(root: Path, common: Common, resume: bool) -> None:
    if root.is_file():
        raise UsageError(f"--output {root} is a file", "name a folder")
    if root.is_dir() and any(root.iterdir()) and not (common.yes or resume):
        raise UsageError(
            f"{root} is not empty", "--resume goes on with an interrupted run, --yes does it anew"
        )


def _plan(chain: Chain) -> Plan:
    """The plans of all steps; what a step will write, the next is planned without."""
    plans = [PLAN[step.verb](chain.work(i, step)) for i, step in enumerate(chain.recipe.steps, 1)]
    known = [plan.seconds for plan in plans if plan.seconds is not None]
    return Plan(
        command="run",
        actions=tuple(f"{plan.command}: {action}" for plan in plans for action in plan.actions),
        memory_bytes=max(plan.memory_bytes for plan in plans),
        disk_bytes=sum(plan.disk_bytes for plan in plans),
        seconds=sum(known) if len(known) == len(plans) else None,
    )


def _all_steps(chain: Chain) -> RunReport:
    from infopt.core.reports.store import save

    began = time.perf_counter()
    reports: list[StepReport] = []
    with ExitStack() as stack:
        for number, step in enumerate(chain.recipe.steps, 1):
            chain.screen.note(f"step {number} of {len(chain.recipe.steps)}: {step.verb}")
            work = chain.work(number, step)
            report = chain.kept(number, work) or _perform(chain, work, stack)
            save(report, chain.root / f"{number:02d}-{step.verb}.json")
            keep(report)
            show(chain.screen, report, None)
            _after(chain, step, work)
            if isinstance(report, EvaluateReport):
                evaluate.check(report, work.settings)
            output = None if work.output is None else str(work.output)
            reports.append(
                StepReport(
                    verb=step.verb, model=str(work.artifact.path), output=output, report=report
                )
            )
    whole = RunReport(
        recipe=chain.recipe.name,
        steps=tuple(reports),
        seconds=time.perf_counter() - began,
        provenance={"seconds": "measured"},
    )
    save(whole, chain.root / "report.json")
    return whole


def _perform(chain: Chain, work: Work, stack: ExitStack) -> Report:
    if work.verb != "serve":
        return done(PERFORM[work.verb], work)
    from infopt.cli.serving import Server, ask_all

    if chain.server is not None:
        chain.server.stop()
    chain.server = stack.enter_context(
        Server(work.artifact.path, work.settings, chain.root / "serve.log")
    )
    server = chain.server
    return done(lambda w: ask_all(server, w.artifact, w.settings), work)


def _after(chain: Chain, step: Step, work: Work) -> None:
    """What a step wrote is what the next one works on."""
    if work.output is not None:
        from infopt.core.artifact.read import read_artifact

        chain.outputs[step.output or work.output.name] = work.output
        chain.newest = read_artifact(work.output)
