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
            help="Re-pack a quantized model into this checkpoint format; dense dequantizes.",
            show_default=False,
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            "--kv-heads",
            metavar="G",
            help="Join key/value heads into G by their mean (GQA; 1 is multi-query attention).",
        ),
    ] = None,
    uptrain: Annotated[
        int | None,
        typer.Option(
            "--uptrain",
            metavar="STEPS",
            help="With --kv-heads: then learn from the model as it was.",
            show_default="0",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Of --uptrain, at its peak.", show_default="0.0002"),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option("--batch-tokens", help="Of --uptrain: of a step.", show_default="4096"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", help="Of --uptrain: of a window.", show_default="256"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Of --uptrain: a .txt or .jsonl file, hub:NAME:SPLIT:COLUMN, ...",
            show_default="default",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --kv-heads: go on with interrupted work.")
    ] = False,
    recipe: opt.RecipeFile = None,
    output: opt.Output = None,
    device: opt.DeviceOption = None,
    dtype: Annotated[
        opt.DTypeWord | None,
        typer.Option(
            "--dtype",
            help="Of the weights of --format dense; of --kv-heads' measurements.",
            show_default="the model's",
        ),
    ] = None,
    seed: opt.Seed = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
    dry_run: opt.DryRun = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Change a model's checkpoint format, exactly, or join its key/value heads.

    Example: infopt convert smol-w4 --format compressed-tensors --output smol-ct
    """
    from infopt.cli.verb import run_verb
    from infopt.core.errors import UsageError

    if format is None and kv_heads is None and recipe is None:
        raise UsageError("nothing to convert to", f"--kv-heads G, or --format {'|'.join(Format)}")
    if format is not None and kv_heads is not None:
        raise UsageError("--format and --kv-heads are two conversions", "do one after the other")
    training: dict[str, Any] = {
        "uptrain": uptrain,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "sequence_length": sequence_length,
        "text": text,
    }
    if format is not None:
        unread = [
            key for key, value in {**training, "device": device, "seed": seed}.items() if value
        ]
        if unread or resume:
            name = (unread or ["resume"])[0].replace("_", "-")
            raise UsageError(f"--{name} is read with --kv-heads only, not with --format")
    given = {"format": format, "kv_heads": kv_heads, **training}
    given["dense_dtype" if kv_heads is None and _repacks(format, recipe) else "dtype"] = dtype
    common = opt.Common(
        recipe, output, device, None, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("convert", model, given, common, perform, plan, resume=resume)


def _repacks(format: Format | None, recipe: Path | None) -> bool:
    """Whether the request is for another format: by the option, else by the recipe's step."""
    if format is not None or recipe is None:
        return True
    from infopt.core.recipe.convert import ConvertSettings
    from infopt.core.recipe.recipe import find_recipe, load_recipe

    steps = load_recipe(find_recipe(str(recipe))).steps
    return any(isinstance(step.settings, ConvertSettings) for step in steps)


def output_of(work: "Work") -> Path:
    """Where to write if nobody said: a folder here, named for the model and the change."""
    from infopt.core.recipe.kv_heads import KvHeadsSettings

    settings = work.settings
    change = f"kv{settings.kv_heads}" if isinstance(settings, KvHeadsSettings) else settings.format
    return work.output or Path(f"{work.artifact.name}-{change}")


def perform(work: "Work") -> "Report":
    from infopt.core.recipe.kv_heads import KvHeadsSettings

    if isinstance(work.settings, KvHeadsSettings):
        return _join(work)
    from infopt.core.conversion.convert import convert as door

    return door(
        work.artifact,
        output_of(work),
        work.settings,
        replace=work.replace,
        progress=work.screen.progress,
    )


def _join(work: "Work") -> "Report":
    from infopt.core.conversion.kv_heads import convert_kv_heads

    try:
        return convert_kv_heads(
            work.artifact,
            output_of(work),
            work.settings,
            resume=work.resume,
            replace=work.replace,
            progress=work.screen.progress,
        )
    except KeyboardInterrupt:
        work.screen.note("what is finished is kept: the same command with --resume goes on")
        raise


def plan(work: "Work") -> "Plan":
    """The plan for a model that is there; what cannot be converted is refused here as well."""
    from infopt.core.conversion.convert import check_convertible
    from infopt.core.conversion.source import look_through
    from infopt.core.recipe.convert import ConvertSettings

    if isinstance(work.settings, ConvertSettings):
        check_convertible(look_through(work.artifact), work.settings)
    return plan_step(work)


def plan_step(work: "Work") -> "Plan":
    """The plan within a recipe, where an earlier step may yet have to write the model."""
    from infopt.core.recipe.kv_heads import KvHeadsSettings

    if isinstance(work.settings, KvHeadsSettings):
        from infopt.core.conversion.kv_heads import plan_kv_heads

        return plan_kv_heads(work.artifact, work.settings)
    from infopt.core.conversion.plan import plan_convert

    return plan_convert(work.artifact, work.settings)
