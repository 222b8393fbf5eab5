"""`infopt quantize`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


class Method(StrEnum):
    rtn = "rtn"
    gptq = "gptq"
    auto_gptq = "auto-gptq"


class Bits(StrEnum):
    two = "2"
    three = "3"
    four = "4"
    eight = "8"


class GroupSize(StrEnum):
    auto = "auto"
    channel = "channel"
    thirty_two = "32"
    sixty_four = "64"
    hundred_twenty_eight = "128"


class GridWord(StrEnum):
    mse = "mse"
    minmax = "minmax"


class Format(StrEnum):
    gptq = "gptq"


def quantize(
    model: opt.Model = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="Rounding to nearest, or GPTQ.", show_default="gptq"),
    ] = None,
    bits: Annotated[
        Bits | None, typer.Option("--bits", help="Bits per weight.", show_default="4")
    ] = None,
    group_size: Annotated[
        GroupSize | None,
        typer.Option(
            "--group-size",
            help="Input columns that share a scale; auto is the largest that divides every layer.",
            show_default="auto",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym", help="Symmetric grid, or one with a zero point.", show_default="sym"
        ),
    ] = None,
    grid: Annotated[
        GridWord | None,
        typer.Option(
            "--grid",
            help="Scales of least squared error, or of the least and the largest weight.",
            show_default="mse",
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option("--format", help="The checkpoint format.", show_default="gptq"),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="GPTQ: most sensitive columns first, static groups.",
            show_default="act-order",
        ),
    ] = None,
    damp_percent: Annotated[
        float | None,
        typer.Option(
            "--damp-percent",
            help="GPTQ: share of the mean Hessian diagonal added to it.",
            show_default="0.01",
        ),
    ] = None,
    true_sequential: Annotated[
        bool | None,
        typer.Option(
            "--true-sequential/--no-true-sequential",
            help="Within a block, each stage sees the quantized ones before it.",
            show_default="true-sequential",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="Calibration text: default, shakespeare, a .txt or .jsonl file, "
            "or hub:NAME[/CONFIG]:SPLIT:COLUMN.",
            show_default="default",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Calibration windows.", show_default="128")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", help="Tokens per calibration window.", show_default="512"
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the calibration text through the chat template.",
            show_default="no-chat",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            help="Leave these linear layers as they are (patterns; repeatable).",
            show_default="lm_head",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with interrupted work at the last finished block."),
    ] = False,
    recipe: opt.RecipeFile = None,
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
    """Quantize a model into a checkpoint that others load.

    Example: infopt quantize --method gptq --bits 4 --output smol-w4
    """
    from infopt.cli.verb import run_verb

    calibrating = {
        "text": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "chat": chat,
    }
    given: dict[str, Any] = {
        "method": method,
        "bits": int(bits) if bits else None,
        "group_size": _group_size(group_size),
        "symmetric": symmetric,
        "grid": grid,
        "format": format,
        "act_order": act_order,
        "damp_percent": damp_percent,
        "true_sequential": true_sequential,
        "ignore": tuple(ignore) if ignore else None,
        "calibration": {key: value for key, value in calibrating.items() if value is not None}
        or None,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("quantize", model, given, common, perform, plan, resume=resume)


def _group_size(word: GroupSize | None) -> int | str | None:
    return int(word) if word is not None and word.isdigit() else word


def output_of(work: "Work") -> Path:
    """Where to write if nobody said: a folder here, named for the model and the scheme."""
    return work.output or Path(f"{work.artifact.name}-{work.settings.method}-w{work.settings.bits}")


def perform(work: "Work") -> "Report":
    """Quantize, and keep the report beside the weights."""
    from infopt.core.quantization.quantize import quantize as door

    try:
        return door(
            work.artifact,
            output_of(work),
            work.settings,
            resume=work.resume,
            replace=work.replace,
            progress=work.screen.progress,
        )
    except KeyboardInterrupt:
        work.screen.note("finished blocks are kept: the same command with --resume goes on")
        raise


def plan(work: "Work") -> "Plan":
    from infopt.core.quantization.plan import plan_quantize

    return plan_quantize(work.artifact, work.settings)
