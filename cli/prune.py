"""`infopt prune`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


class Method(StrEnum):
    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    structured = "structured"


class Allocation(StrEnum):
    uniform = "uniform"
    owl = "owl"


class Importance(StrEnum):
    minitron = "minitron"
    magnitude = "magnitude"
    random = "random"


class DepthImportance(StrEnum):
    block_influence = "block-influence"
    random = "random"


class RetrainFrom(StrEnum):
    dense = "dense"
    text = "text"


def prune(
    model: opt.Model = None,
    method: Annotated[
        Method | None,
        typer.Option(
            "--method",
            help="How weights are chosen; structured removes whole parts.",
            show_default="wanda; structured where a size or a budget is given",
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            metavar="SHARE|N:M",
            help="Share of the weights to remove, or N:M: N kept of every M.",
            show_default="0.5",
        ),
    ] = None,
    allocation: Annotated[
        Allocation | None,
        typer.Option(
            "--allocation",
            help="The same share for all blocks, or less for those with more outliers (OWL).",
            show_default="uniform",
        ),
    ] = None,
    owl_spread: Annotated[
        float | None,
        typer.Option(
            "--owl-spread",
            help="OWL: how far a block's share may be from the mean.",
            show_default="0.08",
        ),
    ] = None,
    owl_outlier: Annotated[
        float | None,
        typer.Option(
            "--owl-outlier",
            help="OWL: an outlier is this many times the mean score.",
            show_default="5",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Blocks that stay.")] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="Query heads that stay; whole KV groups go.")
    ] = None,
    ffn: Annotated[
        str | None,
        typer.Option(
            "--ffn", metavar="N|SHARE", help="Feed-forward channels that stay, such as 0.75x."
        ),
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(
            "--hidden", metavar="N|SHARE", help="Hidden channels that stay, such as 0.75x."
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option("--params", help="Parameters that stay, such as 100M; the shape follows."),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="SHARE",
            help="Share of a decoded token's time, such as 0.7x, by bytes; the shape follows.",
        ),
    ] = None,
    importance: Annotated[
        Importance | None,
        typer.Option(
            "--importance",
            help="Rank heads and channels by activations, by weights or by chance.",
            show_default="minitron",
        ),
    ] = None,
    depth_importance: Annotated[
        DepthImportance | None,
        typer.Option(
            "--depth-importance",
            help="Rank blocks by how much they turn the hidden states, or by chance.",
            show_default="block-influence",
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations", help="Structured: measure and cut in rounds.", show_default="1"
        ),
    ] = None,
    retrain: Annotated[
        int | None,
        typer.Option(
            "--retrain",
            metavar="STEPS",
            help="Train afterwards; what was removed stays so.",
            show_default="0",
        ),
    ] = None,
    retrain_from: Annotated[
        RetrainFrom | None,
        typer.Option(
            "--retrain-from",
            help="Learn from the dense model, or from the text alone.",
            show_default="dense",
        ),
    ] = None,
    retrain_tokens: Annotated[
        int | None,
        typer.Option("--retrain-tokens", help="Tokens of one step.", show_default="4096"),
    ] = None,
    retrain_length: Annotated[
        int | None,
        typer.Option("--retrain-length", help="Tokens of one window.", show_default="256"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Of the retraining, at its peak.", show_default="0.0001"
        ),
    ] = None,
    true_sequential: Annotated[
        bool | None,
        typer.Option(
            "--true-sequential/--no-true-sequential",
            help="Within a block, each stage sees the pruned ones before it.",
            show_default="true-sequential",
        ),
    ] = None,
    damp_percent: Annotated[
        float | None,
        typer.Option(
            "--damp-percent",
            help="SparseGPT: share of the mean Hessian diagonal added to it.",
            show_default="0.01",
        ),
    ] = None,
    calibration: opt.CalibrationText = None,
    samples: opt.Samples = None,
    sequence_length: opt.SequenceLength = None,
    chat: opt.Chat = None,
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
    """Remove weights, channels, heads or layers, and let the model recover.

    Example: infopt prune --method sparsegpt --sparsity 0.5 --retrain 100 --output smol-half
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
        "sparsity": sparsity,
        "allocation": allocation,
        "owl_spread": owl_spread,
        "owl_outlier": owl_outlier,
        "layers": layers,
        "heads": heads,
        "ffn": ffn,
        "hidden": hidden,
        "params": params,
        "latency": latency,
        "importance": importance,
        "depth_importance": depth_importance,
        "iterations": iterations,
        "retrain": retrain,
        "retrain_from": retrain_from,
        "retrain_tokens": retrain_tokens,
        "retrain_length": retrain_length,
        "learning_rate": learning_rate,
        "true_sequential": true_sequential,
        "damp_percent": damp_percent,
        "ignore": tuple(ignore) if ignore else None,
        "calibration": {key: value for key, value in calibrating.items() if value is not None}
        or None,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("prune", model, given, common, perform, plan, resume=resume)


def output_of(work: "Work") -> Path:
    """Where to write if nobody said: a folder here, named for the model and what was removed."""
    settings = work.settings
    if settings.method == "structured":
        return work.output or Path(f"{work.artifact.name}-pruned")
    pattern = settings.sparsity.replace(":", "of")
    return work.output or Path(f"{work.artifact.name}-{settings.method}-{pattern}")


def perform(work: "Work") -> "Report":
    """Prune, and keep the report beside the weights."""
    from infopt.core.pruning.prune import prune as door

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
        work.screen.note("what is finished is kept: the same command with --resume goes on")
        raise


def plan(work: "Work") -> "Plan":
    from infopt.core.pruning.plan import plan_prune

    return plan_prune(work.artifact, work.settings)
