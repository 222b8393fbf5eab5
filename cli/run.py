"""`infopt run`: the steps of a recipe, one after the other."""

from pathlib import Path
from typing import Annotated

import typer

from infopt.cli import options as opt


def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or one that comes with infopt, such as run/demo.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model to start from.", show_default="the recipe's"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted run; finished steps are kept."),
    ] = False,
    output: opt.Output = None,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = None,
    seed: opt.Seed = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Run a recipe: step after step, each on the last output.

    Example: infopt run run/demo --output demo
    """
    from infopt.cli.chain import run_chain
    from infopt.core.recipe.recipe import find_recipe

    path: Path = find_recipe(recipe)
    common = opt.Common(
        path, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_chain(path, model, common, resume=resume)
