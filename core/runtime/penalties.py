"""What is done to a request's logits before a token is chosen from them."""

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from infopt.core.runtime.request import SamplingParams


def changes_logits(params: SamplingParams) -> bool:
    """Whether `penalized` would do anything for these."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def penalized(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits float32 [vocabulary] with bias, then repetition, then presence and frequency penalty.

    In the order of transformers and vLLM; presence and frequency look at the answer alone, as
    OpenAI has them.
    """
    logits = logits.clone()
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, _tensor(tokens, logits), torch.tensor(biases, device=logits.device))
    if params.repetition_penalty != 1:
        seen = _tensor({*prompt, *answer}, logits)
        values, factor = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(answer)
        taken = [params.presence_penalty + params.frequency_penalty * n for n in counts.values()]
        logits[_tensor(counts, logits)] -= torch.tensor(taken, device=logits.device)
    return logits


def masked(logits: Tensor, allowed: Tensor | None, barred: Collection[int]) -> Tensor:
    """Logits [vocabulary] with -inf for what is not `allowed` [vocabulary] and what is barred."""
    if allowed is not None:
        logits = torch.where(allowed.to(logits.device), logits, -torch.inf)
    if barred:
        logits = logits.index_fill(0, _tensor(barred, logits), -torch.inf)
    return logits


def _tensor(tokens: Collection[int], beside: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=beside.device)
