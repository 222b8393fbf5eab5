"""`infopt profile`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


def profile(
    model: opt.Model = None,
    mfu: Annotated[
        bool | None, typer.Option("--mfu", help="Measure prefill; model FLOP/s utilization.")
    ] = None,
    mbu: Annotated[
        bool | None, typer.Option("--mbu", help="Measure decode; model bandwidth utilization.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Sequences at once.", show_default="1")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Tokens per prompt.", show_default="512")
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option("--output-tokens", help="Decode steps measured.", show_default="32"),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="Prefills measured.", show_default="5")
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
    """Count what a model needs, measure what the device does.

    Example: infopt profile --mfu --mbu
    """
    from infopt.cli.verb import run_verb

    given: dict[str, Any] = {
        "mfu": mfu,
        "mbu": mbu,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repeats": repeats,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("profile", model, given, common, perform, plan)


def perform(work: "Work") -> "Report":
    from infopt.core.profiling.profile import profile as door

    plan(work)  # what cannot be is told before the weights are loaded
    runner = None
    if work.settings.mfu or work.settings.mbu:
        from infopt.core.recipe.serve import EngineSettings
        from infopt.core.runtime.phases import PhaseRunner

        engine = EngineSettings(
            device=work.settings.device, dtype=work.settings.dtype, seed=work.settings.seed
        )
        runner = PhaseRunner(work.artifact, engine)
    return door(work.artifact, work.settings, runner, progress=work.screen.progress)


def plan(work: "Work") -> "Plan":
    from infopt.core.profiling.profile import plan_profile

    return plan_profile(work.artifact, work.settings)
