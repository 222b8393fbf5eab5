"""What an evaluation will do, told before anything is loaded (no torch)."""

from infopt.core.artifact.positions import known_positions
from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.hardware.calibration import load_calibration
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import probe
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.reports.schema import Plan

# The share of the peak that evaluation reaches: assumed.
_UTILIZATION = 0.4
# A chunk of each model's softmax and what is derived from it.
_SOFTMAX_BYTES = 4 * 64 * 2**20


def stride_of(settings: EvaluateSettings) -> int:
    """Tokens between the starts of windows; by default they do not overlap."""
    return settings.stride or settings.context


def protocol(settings: EvaluateSettings) -> str:
    """How the text is scored, in words."""
    context, stride = settings.context, stride_of(settings)
    source = "through the chat template" if settings.chat else "as it is"
    if stride == context:
        cut = f"cut into windows of {context} tokens that do not overlap"
    else:
        cut = (
            f"read in windows of {context} tokens, {stride} apart; each window after the first "
            f"scores its last {stride} predictions"
        )
    return (
        f"one token stream (the text, {source}), {cut}; every token but the first of the stream "
        "is scored exactly once, given the tokens of its window before it"
    )


def check_settings(artifact: Artifact, settings: EvaluateSettings, *, baseline: bool) -> None:
    """Raise UsageError for what can be told before any text or weight is read."""
    if settings.max_ppl_increase is not None and not baseline:
        raise UsageError(
            "a bound on the increase of perplexity needs a baseline to compare with",
            "add --baseline MODEL",
        )
    if stride_of(settings) > settings.context:
        raise UsageError(
            f"a stride of {settings.stride} skips tokens between windows of {settings.context}",
            "use a stride of at most the context",
        )
    longest = known_positions(artifact)
    if longest is not None and settings.context > longest:
        raise UsageError(
            f"{artifact.name} has {longest} positions, too few for a context of {settings.context}",
            f"use --context {longest} or less",
        )


def plan_evaluate(
    artifact: Artifact, settings: EvaluateSettings, baseline: Artifact | None = None
) -> Plan:
    """What `evaluate` would do, the memory and, on a calibrated device, the time it would take.

    A baseline that is only named in the settings counts as large as the model.
    Raises UsageError as `evaluate` would.
    """
    compared = baseline is not None or settings.baseline is not None
    check_settings(artifact, settings, baseline=compared)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    width = 4 if dtype == "float32" else 2
    other = baseline.name if baseline else settings.baseline
    second = [baseline or artifact] if compared else []
    parameters = sum(model.summary().parameters for model in (artifact, *second))
    logits = (1 + compared) * settings.context * int(artifact.config.get("vocab_size", 0)) * width
    amount = "all" if settings.tokens is None else f"at most {settings.tokens}"
    actions = [
        f"load {artifact.name}{f' and {other}' if compared else ''} on {device} in {dtype}",
        f"score {amount} tokens of the text {settings.text!r}: {protocol(settings)}",
    ]
    if settings.max_ppl_increase is not None:
        actions.append(f"fail if perplexity rises by more than {settings.max_ppl_increase:.2%}")
    return Plan(
        command="evaluate",
        actions=tuple(actions),
        memory_bytes=parameters * width + logits + _SOFTMAX_BYTES,
        seconds=_seconds(settings, parameters, device, dtype),
    )


def _seconds(settings: EvaluateSettings, parameters: int, device: str, dtype: str) -> float | None:
    """Two FLOPs a parameter and token at the assumed share of the stored peak; None without one."""
    machine = probe()
    name = machine.gpus[0].name if device == "cuda" else machine.cpu
    threads = 1 if device == "cuda" else machine.physical_cores
    record, _ = load_calibration(name, dtype, threads)
    if record is None or settings.tokens is None:
        return None
    overlap = settings.context / stride_of(settings)
    return 2 * parameters * settings.tokens * overlap / (_UTILIZATION * record.flops_per_s)
