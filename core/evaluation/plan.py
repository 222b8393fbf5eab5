"""What an evaluation will do, told before anything is loaded (no torch)."""

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.reports.schema import Plan

# A chunk of each model's softmax and what is derived from it.
_SOFTMAX_BYTES = 4 * 64 * 2**20


def stride_of(settings: EvaluateSettings) -> int:
    """Tokens between the starts of windows; by default they do not overlap."""
    return settings.stride or settings.context


def protocol(settings: EvaluateSettings) -> str:
    """How the text is scored, in words."""
    context, stride = settings.context, stride_of(settings)
    source = "each document as a user's message through the chat template" if settings.chat else "as it is"
    if stride == context:
        cut = f"cut into windows of {context} tokens that do not overlap"
    else:
        cut = (
            f"read in windows of {context} tokens, {stride} apart; each window after the first scores "
            f"its last {stride} predictions"
        )
    return (
        f"one token stream (the text {source}), {cut}; every token but the first of the stream is scored "
        "exactly once, given the tokens of its window before it"
    )


def check_settings(
    artifact: Artifact, settings: EvaluateSettings, baseline: Artifact | None
) -> None:
    """Raise UsageError for what can be told before any text or weight is read."""
    if settings.max_ppl_increase is not None and baseline is None:
        raise UsageError(
            "a bound on the increase of perplexity needs a baseline to compare with",
            "add --baseline MODEL",
        )
    longest = artifact.config.get("max_position_embeddings")
    if isinstance(longest, int) and settings.context > longest:
        raise UsageError(
            f"a context of {settings.context} tokens exceeds the {longest} positions of {artifact.name}",
            f"use --context {longest} or less",
        )


def plan_evaluate(
    artifact: Artifact, settings: EvaluateSettings, baseline: Artifact | None = None
) -> Plan:
    """What `evaluate` would do, and the memory it would take; raises UsageError as it would."""
    check_settings(artifact, settings, baseline)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    width = 4 if dtype == "float32" else 2
    models = [artifact] if baseline is None else [artifact, baseline]
    weights = sum(model.summary().parameters * width for model in models)
    vocabulary = int(artifact.config.get("vocab_size", 0))
    logits = len(models) * settings.context * vocabulary * width
    amount = "all" if settings.tokens is None else f"the first {settings.tokens}"
    actions = [
        f"load {', then '.join(model.name for model in models)} on {device} in {dtype}",
        f"score {amount} tokens of the text {settings.text!r}: {protocol(settings)}",
    ]
    if settings.max_ppl_increase is not None:
        actions.append(f"fail if perplexity rises by more than {settings.max_ppl_increase:.2%}")
    return Plan(
        command="evaluate", actions=tuple(actions), memory_bytes=weights + logits + _SOFTMAX_BYTES
    )
