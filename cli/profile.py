"""`infopt profile`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.verb import Work
    from infopt.core.artifact.read import Artifact
    from infopt.core.recipe.serve import EngineSettings
    from infopt.core.reports.profile import CalibrationTable
    from infopt.core.reports.schema import Plan, Report


def profile(
    model: opt.Model = None,
    mfu: Annotated[
        bool | None, typer.Option("--mfu", help="Measure prefill; model FLOP/s utilization.")
    ] = None,
    mbu: Annotated[
        bool | None, typer.Option("--mbu", help="Measure decode; model bandwidth utilization.")
    ] = None,
    static: Annotated[
        bool | None,
        typer.Option("--static", help="Count and predict from a config.json; nothing is run."),
    ] = None,
    kv: Annotated[
        bool | None, typer.Option("--kv", help="Tell the size of the KV cache, and no more.")
    ] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option("--calibrate", help="Measure this device and its kernels, and keep that."),
    ] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory", help="Sample the memory while the phases run.")
    ] = None,
    energy: Annotated[
        bool | None, typer.Option("--energy", help="Count joules, where the device counts them.")
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option("--trace", metavar="FILE", help="Write a trace for Chrome and Perfetto."),
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
    context: Annotated[
        int | None,
        typer.Option(
            "--context", help="Prompt and output together.", show_default="prompt + output"
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="Prefills measured.", show_default="5")
    ] = None,
    weight_bits: Annotated[
        float | None,
        typer.Option("--weight-bits", help="What if a layer's weight took so many: 4.25, say."),
    ] = None,
    kv_dtype: Annotated[
        opt.KvDTypeWord | None,
        typer.Option("--kv-dtype", help="What if the cache were kept so.", show_default="auto"),
    ] = None,
    kernels: opt.Kernels = None,
    device_memory_gb: Annotated[
        float | None,
        typer.Option("--device-memory-gb", help="Of a named device that is sold in sizes."),
    ] = None,
    recipe: opt.RecipeFile = None,
    output: opt.ReportOutput = None,
    device: opt.DeviceName = None,
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
        "static": static,
        "kv": kv,
        "calibrate": calibrate,
        "memory": memory,
        "energy": energy,
        "trace": trace,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "context": context,
        "repeats": repeats,
        "weight_bits": weight_bits,
        "kv_dtype": kv_dtype,
        "kernels": kernels,
        "device_memory_gb": device_memory_gb,
    }
    common = opt.Common(
        recipe, output, device, dtype, seed, json, quiet, yes, dry_run, trust_remote_code
    )
    run_verb("profile", model, given, common, perform, plan)


def perform(work: "Work") -> "Report":
    from infopt.core.profiling.plan import plan_profile
    from infopt.core.profiling.profile import profile as door

    settings, runner = work.settings, None
    artifact = _artifact(work)
    plan_profile(artifact, settings)  # what cannot be is told before the weights are loaded
    table = _calibrate(work) if settings.calibrate else None
    if settings.measures:
        from infopt.core.hardware.native import tell_native
        from infopt.core.runtime.phases import PhaseRunner

        tell_native(settings.kernels, settings.device, work.screen.progress)
        runner = PhaseRunner(artifact, _engine(work))
    report = door(artifact, settings, runner, progress=work.screen.progress)
    return report.model_copy(update={"calibration": table})


def _calibrate(work: "Work") -> "CalibrationTable":
    """What is the engine's is the runtime's to say, which the profile does not know."""
    import torch

    from infopt.core.hardware.probe import probe
    from infopt.core.profiling.calibrate_kernels import calibrate_device
    from infopt.core.profiling.subject import target_of
    from infopt.core.runtime.step_times import engine_step_seconds, engine_steps, tiny_config

    engine, target = _engine(work), target_of(work.settings, probe())
    return calibrate_device(
        target,
        engine_steps(engine, torch.device(target.kind)),
        lambda batch, vocabulary: engine_step_seconds(batch, vocabulary, engine),
        tiny_config,
        work.screen.progress,
    )


def _engine(work: "Work") -> "EngineSettings":
    from infopt.core.recipe.serve import EngineSettings

    settings = work.settings
    return EngineSettings(
        kernels=settings.kernels, device=settings.device, dtype=settings.dtype, seed=settings.seed
    )


def _artifact(work: "Work") -> "Artifact":
    """The model; of one that is only counted, a config.json is enough."""
    if (work.settings.static or work.settings.kv) and isinstance(work.model, str):
        from infopt.core.artifact.locate import bare_config

        if (found := bare_config(work.model)) is not None:
            return found
    return work.artifact


def plan(work: "Work") -> "Plan":
    from infopt.core.profiling.plan import plan_profile

    return plan_profile(_artifact(work), work.settings)
