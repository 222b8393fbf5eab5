"""`infopt quantize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt
from infopt.cli.words import (
    Bits,
    Format,
    Fp8,
    GridWord,
    GroupSize,
    KvCache,
    Method,
    OffloadWord,
    Rounding,
    Scheme,
)
from infopt.core.errors import UsageError

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.reports.schema import Plan, Report


def quantize(
    model: opt.Model = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="How to quantize.", show_default="gptq"),
    ] = None,
    scheme: Annotated[
        Scheme | None,
        typer.Option(
            "--scheme",
            help="Bits of weights and activations; W16A16 only transforms.",
            show_default="by method and bits",
        ),
    ] = None,
    bits: Annotated[
        Bits | None,
        typer.Option("--bits", help="Bits per weight.", show_default="by scheme, else 4"),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            "--target-bits", help="Give layers different bits, this many on average, such as 3.5."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            "--max-ppl-increase",
            metavar="SHARE",
            help="Give layers as few bits as keep perplexity within this share, such as 1%.",
        ),
    ] = None,
    mixed_bits: Annotated[
        str | None,
        typer.Option(
            "--mixed-bits",
            metavar="LIST",
            help="The widths that mixed layers may have.",
            show_default="3,4,8",
        ),
    ] = None,
    analyze: Annotated[
        bool,
        typer.Option(
            "--analyze", help="Only measure what each layer costs at each width; write no model."
        ),
    ] = False,
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
        typer.Option("--format", help="The checkpoint format.", show_default="by scheme"),
    ] = None,
    kv_cache: Annotated[
        KvCache | None,
        typer.Option("--kv-cache", help="Calibrate and store scales for a quantized KV cache."),
    ] = None,
    rounding: Annotated[
        Rounding | None,
        typer.Option(
            "--rounding",
            help="How weights are rounded after awq, smoothquant or rotate.",
            show_default="gptq; awq: rtn",
        ),
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
            help="GPTQ: within a block, each stage sees the quantized ones before it.",
            show_default="true-sequential",
        ),
    ] = None,
    gptaq: Annotated[
        float | None,
        typer.Option(
            "--gptaq",
            help="GPTQ: weight of the correction for inputs that are off already (GPTAQ: 0.25).",
            show_default="0, off",
        ),
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip/--no-clip", help="AWQ: search each group's range.", show_default="clip"
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha",
            help="SmoothQuant: how much of the inputs' range moves into weights, or search.",
            show_default="search",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="LLM.int8: inputs from this magnitude on stay in 16 bits.",
            show_default="6.0",
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant",
            help="NF4: quantize the scales as well.",
            show_default="double-quant",
        ),
    ] = None,
    fp8: Annotated[
        Fp8 | None,
        typer.Option(
            "--fp8",
            help="FP8: scales of inputs per token, calibrated, or per 128 x 128 block.",
            show_default="dynamic",
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", help="AutoRound: steps for each block.", show_default="200"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="QAT: optimizer steps.", show_default="200")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="QAT: the peak, in steps of the grid.", show_default="0.005"
        ),
    ] = None,
    all_experts: Annotated[
        bool | None,
        typer.Option(
            "--all-experts/--routed-experts",
            help="Calibrate every expert of an MoE on every token, or on those routed to it.",
            show_default="all-experts",
        ),
    ] = None,
    calibration: opt.CalibrationText = None,
    samples: opt.Samples = None,
    sequence_length: opt.SequenceLength = None,
    chat: opt.Chat = None,
    offload: Annotated[
        OffloadWord | None,
        typer.Option(
            "--offload",
            help="Where the text's hidden states are kept; auto: on disk if memory is short.",
            show_default="auto",
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
        "scheme": scheme,
        "bits": int(bits) if bits else None,
        "target_bits": target_bits,
        "max_ppl_increase": max_ppl_increase,
        "mixed_bits": _widths(mixed_bits),
        "group_size": _group_size(group_size),
        "symmetric": symmetric,
        "grid": grid,
        "format": format,
        "kv_cache": kv_cache,
        "rounding": rounding,
        "act_order": act_order,
        "damp_percent": damp_percent,
        "true_sequential": true_sequential,
        "gptaq": gptaq,
        "clip": clip,
        "alpha": _number(alpha),
        "threshold": threshold,
        "double_quant": double_quant,
        "fp8": fp8,
        "iterations": iterations,
        "steps": steps,
        "learning_rate": learning_rate,
        "calibrate_all_experts": all_experts,
        "offload": offload,
        "ignore": tuple(ignore) if ignore else None,
        "calibration": {key: value for key, value in calibrating.items() if value is not None}
        or None,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    if not analyze:
        run_verb("quantize", model, given, common, perform, plan, resume=resume)
        return
    if resume:
        raise UsageError("--analyze has nothing to resume: it writes no model", "leave out one")
    if target_bits is None and max_ppl_increase is None and recipe is None:
        # The report tells what the widest widths would give: nothing is left out of the scheme.
        given["target_bits"] = float(max(given["mixed_bits"] or (8,)))
    run_verb("analyze", model, given, common, perform_analysis, plan_analysis)


def _widths(words: str | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise UsageError(f"--mixed-bits {words!r} is no list of widths", "such as 2,3,4") from None


def _number(word: str | None) -> float | str | None:
    try:
        return None if word is None else float(word)
    except ValueError:
        return word


def _group_size(word: GroupSize | None) -> int | str | None:
    return int(word) if word is not None and word.isdigit() else word


def output_of(work: "Work") -> Path:
    """Where to write if nobody said: a folder here, named for the model and the scheme."""
    settings = work.settings
    scheme = settings.scheme.split("-")[0].removesuffix("A16").lower()
    if settings.target_bits is not None:
        scheme = f"w{settings.target_bits:g}"
    method = "" if settings.method == scheme else f"-{settings.method}"
    return work.output or Path(f"{work.artifact.name}{method}-{scheme}")


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


def perform_analysis(work: "Work") -> "Report":
    """Measure what each unit of layers costs at each width."""
    from infopt.core.quantization.analyze import analyze

    return analyze(work.artifact, work.settings, progress=work.screen.progress)


def plan_analysis(work: "Work") -> "Plan":
    from infopt.core.quantization.analyze import plan_analyze

    return plan_analyze(work.artifact, work.settings)
