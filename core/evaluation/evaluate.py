"""Evaluate a model on held-out text: perplexity, and its distance from a baseline."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.errors import GateError, UsageError
from infopt.core.evaluation.perplexity import perplexity, windows
from infopt.core.evaluation.plan import check_settings, protocol, stride_of
from infopt.core.evaluation.score import Sums, score
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.reports.evaluate import BaselineQuality, EvaluateReport
from infopt.core.reports.schema import Origin
from infopt.core.text.sources import Text, evaluation_text
from infopt.core.text.windows import token_stream


def evaluate(
    artifact: Artifact,
    settings: EvaluateSettings,
    baseline: Artifact | None = None,
    progress: ProgressCallback = silent,
) -> EvaluateReport:
    """Score the text's tokens with the model and, where given, the baseline; `made` stays None.

    Both models are in memory together, so that the KL divergence needs no stored logits; a
    baseline that is the model itself is loaded once. Should a model draw, it draws by the seed.
    Raises UsageError (settings, text or baseline do not fit), NumericsError (logits not finite).
    """
    check_settings(artifact, settings, baseline=baseline is not None)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    text = evaluation_text(settings.text)
    stream, characters = _tokenize(artifact, baseline, text, settings)
    plan = windows(len(stream), settings.context, stride_of(settings))
    model = _load(artifact, dtype, device, progress)
    base = None
    if baseline is not None:
        same = baseline.path.resolve() == artifact.path.resolve()
        base = model if same else _load(baseline, dtype, device, progress)
        _check_vocabularies(model, base, baseline)
    with torch.random.fork_rng(devices=[] if device == "cpu" else [torch.cuda.current_device()]):
        torch.manual_seed(settings.seed)
        sums = score(model, base, stream.to(device), plan, progress)
    facts = _Facts(text, characters, len(plan), dtype, _resident(model))
    return _report(artifact, baseline, settings, facts, sums)


def check_gate(report: EvaluateReport, settings: EvaluateSettings) -> None:
    """Raise GateError if perplexity rose above the baseline's by more than the settings allow."""
    bound, baseline = settings.max_ppl_increase, report.baseline
    if bound is None or baseline is None:
        return
    if not report.perplexity <= baseline.perplexity * (1 + bound):
        increase = report.perplexity / baseline.perplexity - 1
        raise GateError(
            f"perplexity {report.perplexity:.4f} is {increase:+.2%} off the baseline's "
            f"{baseline.perplexity:.4f}, and at most {bound:+.2%} is allowed"
        )


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the report says beside the scores."""

    text: Text
    characters: int
    windows: int
    dtype: str
    memory_bytes: int


def _tokenize(
    artifact: Artifact, baseline: Artifact | None, text: Text, settings: EvaluateSettings
) -> tuple[Tensor, int]:
    """The text as tokens, int64 [n], and the characters of all but the first, which are scored.

    Raises UsageError where the baseline would read other tokens.
    """
    tokenizer = artifact.tokenizer()
    stream = token_stream(text, tokenizer, chat=settings.chat, limit=settings.tokens)
    if baseline is not None:
        other = token_stream(text, baseline.tokenizer(), chat=settings.chat, limit=settings.tokens)
        if not torch.equal(stream, other):
            raise UsageError(
                f"{artifact.name} and its baseline {baseline.name} split the text differently",
                "compare models that share a tokenizer",
            )
    scored = tokenizer.decode(
        stream[1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return stream, len(scored)


def _load(
    artifact: Artifact, dtype: str, device: str, progress: ProgressCallback
) -> PreTrainedModel:
    progress(Progress("load", note=artifact.name))
    return load_transformers(artifact, getattr(torch, dtype), torch.device(device))


def _check_vocabularies(model: PreTrainedModel, base: PreTrainedModel, baseline: Artifact) -> None:
    ours, theirs = (len(m.get_output_embeddings().weight) for m in (model, base))
    if ours != theirs:
        raise UsageError(
            f"the baseline {baseline.name} has {theirs} tokens in its vocabulary, the model {ours}",
            "compare models that share a vocabulary",
        )


def _resident(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers, shared ones once."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def _report(
    artifact: Artifact,
    baseline: Artifact | None,
    settings: EvaluateSettings,
    facts: _Facts,
    sums: Sums,
) -> EvaluateReport:
    nll, base_nll = sums.nll / sums.tokens, sums.baseline_nll / sums.tokens
    against: dict[str, Any] = {}
    if baseline is not None:
        against = {
            "baseline": BaselineQuality(
                model=baseline.summary(), perplexity=perplexity(base_nll), nll=base_nll
            ),
            "delta_nll": nll - base_nll,
            "kl_divergence": sums.kl / sums.tokens,
            "top1_agreement": sums.agreements / sums.tokens,
        }
    return EvaluateReport(
        model=artifact.summary(),
        provenance=_provenance(against),
        text=facts.text.name,
        text_sha256=facts.text.sha256,
        protocol=protocol(settings),
        windows=facts.windows,
        context=settings.context,
        stride=stride_of(settings),
        tokens=sums.tokens,
        perplexity=perplexity(nll),
        nll=nll,
        characters=facts.characters,
        bits_per_character=sums.nll / math.log(2) / max(facts.characters, 1),
        tokens_per_s=sums.timed_tokens / sums.seconds,
        dtype=facts.dtype,
        memory_bytes=facts.memory_bytes,
        **against,
    )


def _provenance(against: dict[str, Any]) -> dict[str, Origin]:
    """Counts and timings are measured; what follows from the request or from files is computed."""
    computed = ("model", "windows", "context", "stride", "baseline.model")
    counted = ("tokens", "perplexity", "nll", "characters", "bits_per_character")
    found: dict[str, Origin] = dict.fromkeys(
        (*counted, "tokens_per_s", "memory_bytes", *against), "measured"
    )
    return found | dict.fromkeys(computed if against else computed[:-1], "computed")
