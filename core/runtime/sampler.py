"""Choose the next token of each request from its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.runtime.request import SamplingParams, TokenLogprob

# The most likely tokens nearly always hold the nucleus, and are far cheaper to find than a sort.
_WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, or None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def sample(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[Choice]:
    """Choose for each row of logits [R, vocabulary], which no other row has a part in."""
    logits = logits.float()
    # A sum is finite exactly when all its terms are: logits are far from float32's limit.
    finite = torch.isfinite(logits.sum(-1)).tolist()
    best = logits.argmax(-1).tolist()
    return [
        _choose(logits[row], best[row], params[row], generators[row])
        if finite[row]
        else Choice(None)
        for row in range(len(params))
    ]


def _choose(
    logits: Tensor, best: int, params: SamplingParams, generator: torch.Generator
) -> Choice:
    token = best if params.temperature == 0 else _draw(logits, params, generator)
    logprob = None if params.logprobs is None else _logprob(logits, token, params.logprobs)
    return Choice(token, logprob)


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw from the softmax of logits / temperature, cut to the top k and then to the nucleus p.

    One uniform number of the request's own generator is turned into a token by the inverse of the
    cumulative distribution (nucleus: Holtzman et al. 2020, arXiv 1904.09751).
    """
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    # Shifted first, so that a tiny temperature overflows to -inf and not to inf.
    scaled = (logits.double() - logits.max()) / params.temperature
    if params.top_k == 0 and params.top_p == 1:
        return _invert(scaled.softmax(-1), uniform)
    probabilities, tokens = _most_likely(scaled, params)
    return int(tokens[_invert(probabilities, uniform)])


def _most_likely(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The candidates that top k and top p leave, most likely first, and their tokens."""
    vocabulary = scaled.shape[-1]
    limit = min(params.top_k or vocabulary, vocabulary)
    width = min(limit, _WINDOW) if params.top_p < 1 else limit
    values, tokens = scaled.topk(width)
    # The nucleus is a share of what top k leaves: of everything where there is no k.
    total = scaled.logsumexp(-1) if limit == vocabulary else scaled.topk(limit).values.logsumexp(-1)
    probabilities = (values - total).exp()
    if width < limit and float(probabilities.sum()) < params.top_p:
        values, tokens = scaled.topk(limit)
        probabilities = (values - total).exp()
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        # The token that crosses p stays, so that at least one is left.
        count = max(1, int((before < params.top_p).sum()))
        probabilities, tokens = probabilities[:count], tokens[:count]
    return probabilities, tokens


def _invert(probabilities: Tensor, uniform: float) -> int:
    """The index at which the cumulative sum, scaled to end at 1, passes `uniform` (below 1)."""
    cumulative = probabilities.cumsum(-1)
    target = cumulative[-1:] * uniform
    index = torch.searchsorted(cumulative, target, right=True)
    return min(int(index), len(probabilities) - 1)


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(count)
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
