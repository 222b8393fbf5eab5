"""Run a model, and its baseline beside it, over the windows of a token stream."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.errors import NumericsError
from infopt.core.evaluation.divergence import divergence
from infopt.core.evaluation.perplexity import Window, perplexity, token_nll
from infopt.core.progress import Progress, ProgressCallback


@dataclass
class Sums:
    """What the windows add up to; NLL and KL in nats, summed in float64."""

    tokens: int = 0
    nll: float = 0.0
    baseline_nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    timed_tokens: int = 0
    """Tokens read in `seconds`."""
    seconds: float = 0.0
    """Of the model's own forward passes; the first window only warms up, if there are others."""


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None,
    stream: Tensor,
    plan: tuple[Window, ...],
    progress: ProgressCallback,
) -> Sums:
    """NLL of each scored token of `stream` (int64 [n]), and KL and agreement against the baseline.

    One window's logits [scored, V] of each model are held at a time.
    Raises NumericsError naming the window where logits are not finite.
    """
    sums = Sums()
    for number, window in enumerate(plan, 1):
        where = f"window {number} of {len(plan)} (tokens {window.start} to {window.stop})"
        targets = stream[window.first + 1 : window.stop + 1]
        began = time.perf_counter()
        logits = _logits(model, stream, window)
        if number > 1 or len(plan) == 1:
            sums.seconds += time.perf_counter() - began
            sums.timed_tokens += window.stop - window.start
        sums.tokens += window.scored
        sums.nll += _total(token_nll(logits, targets), f"the model's logits in {where}")
        if baseline is not None:
            expected = _logits(baseline, stream, window)
            nll = token_nll(expected, targets)
            sums.baseline_nll += _total(nll, f"the baseline's logits in {where}")
            kl, agree = divergence(expected, logits)
            sums.kl += _total(kl, f"the divergence from the baseline in {where}")
            sums.agreements += int(agree.sum())
        note = f"perplexity {perplexity(sums.nll / sums.tokens):.3f}"
        progress(Progress("evaluate", number, len(plan), note))
    return sums


def _logits(model: PreTrainedModel, stream: Tensor, window: Window) -> Tensor:
    """The window's scored logits [scored, V], computed when this returns."""
    ids = stream[window.start : window.stop].unsqueeze(0)
    found: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=window.scored).logits[0]
    if found.is_cuda:
        torch.cuda.synchronize(found.device)
    return found[-window.scored :]


def _total(values: Tensor, what: str) -> float:
    total = float(values.sum())
    if not math.isfinite(total):
        raise NumericsError(f"{what} are not finite", "try --dtype float32, or check the weights")
    return total
