"""`infopt convert`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


class Format(StrEnum):
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    fp8 = "fp8"
    bitsandbytes = "bitsandbytes"
    dense = "dense"


def convert(
    model: opt.Model = None,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="The checkpoint format to write; dense dequantizes.",
            show_default=False,
        ),
    ] = None,
    recipe: opt.RecipeFile = None,
    output: opt.Output = None,
    dtype: Annotated[
        opt.DTypeWord | None,
        typer.Option(
            "--dtype", help="Type of the weights of --format dense.", show_default="the model's"
        ),
    ] = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Re-pack a quantized model into another checkpoint format, exactly.

    Example: infopt convert smol-w4 --format compressed-tensors --output smol-ct
    """
    from infopt.cli.verb import run_verb
    from infopt.core.errors import UsageError

    if format is None and recipe is None:
        raise UsageError("--format is missing", f"one of {', '.join(Format)}")
    given: dict[str, Any] = {"format": format, "dense_dtype": dtype}
    common = opt.Common(
        recipe, output, None, None, None, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("convert", model, given, common, perform, plan)


def output_of(work: "Work") -> Path:
    """Where to write if nobody said: a folder here, named for the model and the format."""
    return work.output or Path(f"{work.artifact.name}-{work.settings.format}")


def perform(work: "Work") -> "Report":
    from infopt.core.conversion.convert import convert as door

    return door(
        work.artifact,
        output_of(work),
        work.settings,
        replace=work.replace,
        progress=work.screen.progress,
    )


def plan(work: "Work") -> "Plan":
    """The plan for a model that is there; what cannot be converted is refused here as well."""
    from infopt.core.conversion.convert import check_convertible
    from infopt.core.conversion.source import look_through

    check_convertible(look_through(work.artifact), work.settings)
    return plan_step(work)


def plan_step(work: "Work") -> "Plan":
    """The plan within a recipe, where an earlier step may yet have to write the model."""
    from infopt.core.conversion.plan import plan_convert

    return plan_convert(work.artifact, work.settings)
