"""`infopt evaluate`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


def evaluate(
    model: opt.Model = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Held-out text: default, shakespeare, a .txt or .jsonl file, "
            "or hub:NAME[/CONFIG]:SPLIT:COLUMN.",
            show_default="default",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Compare with this model: KL divergence, top-1 agreement.",
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            "--max-ppl-increase",
            metavar="SHARE",
            help="Exit 1 if perplexity exceeds the baseline's by more than this, such as 2%.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens per window.", show_default="1024")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Tokens between windows.", show_default="the context"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", help="Use at most this many tokens of the text.", show_default="16384"
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the text through the chat template.",
            show_default="no-chat",
        ),
    ] = None,
    recipe: opt.RecipeFile = None,
    output: opt.ReportOutput = None,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = None,
    seed: opt.Seed = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Measure quality: perplexity, divergence from a baseline.

    Example: infopt evaluate smol-w4 --baseline default --max-ppl-increase 2%
    """
    from infopt.cli.verb import run_verb

    given: dict[str, Any] = {
        "text": text,
        "baseline": baseline,
        "max_ppl_increase": max_ppl_increase,
        "context": context,
        "stride": stride,
        "tokens": tokens,
        "chat": chat,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("evaluate", model, given, common, perform, plan, after=check)


def perform(work: "Work") -> "Report":
    from infopt.core.evaluation.evaluate import evaluate as door

    baseline = work.open(work.settings.baseline) if work.settings.baseline else None
    return door(work.artifact, work.settings, baseline, work.screen.progress)


def check(report: Any, settings: Any) -> None:
    """Exit 1 if the bound was passed."""
    from infopt.core.evaluation.evaluate import check_gate

    check_gate(report, settings)


def plan(work: "Work") -> "Plan":
    from infopt.core.evaluation.plan import plan_evaluate

    return plan_evaluate(work.artifact, work.settings)
