"""Choose the next token of each request from its logits."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.runtime.penalties import changes_logits, masked, penalized
from infopt.core.runtime.request import Request, SamplingParams, TokenLogprob

# The most likely tokens nearly always hold the nucleus, and are far cheaper to find than a sort.
_WINDOW = 1024
NOTHING_LEFT = "no token may come next: the grammar gave up, or all that it allows is barred"


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, or None where the logits were not finite, or nothing was left to choose."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    fault: str | None = None
    """Why there is no token, unless it is the logits'."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens that are chosen, or will be once the device comes to it."""

    tokens: Tensor
    """int64 [R], on the device; negative where there is none."""
    read: Callable[[], list[Choice]]
    """Waits for them."""

    def gather(self, rows: Tensor) -> Tensor:
        """Those of rows int64 [N], on the device, as inputs of a step; nobody waits."""
        device = self.tokens.device
        if device.type == "cuda":
            rows = rows.pin_memory().to(device, non_blocking=True)
        return self.tokens.index_select(0, rows).clamp_(min=0)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to choose: how, from what numbers, after what, and among what."""

    params: SamplingParams
    generator: torch.Generator
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    """What was chosen so far; prompt and answer are read where the params have penalties."""
    allowed: Tensor | None = None
    """bool [vocabulary]."""
    barred: Collection[int] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the token is chosen from the logits as they are."""
        return self.allowed is None and not self.barred and not changes_logits(self.params)


def draw_for(request: Request) -> Draw:
    """How the request's next token is to be chosen."""
    params, length = request.params, request.prompt_length
    read = changes_logits(params)  # else copying them each step would be for nothing
    return Draw(
        params,
        request.generator,
        prompt=request.tokens[:length] if read else (),
        answer=request.tokens[length:] if read else (),
        allowed=None if request.constraint is None else request.constraint.allowed(),
        barred=request.ends if len(request.tokens) - length < params.min_tokens else (),
    )


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Choose for each row of logits [R, vocabulary], which no other row has a part in."""
    logits = logits.float()
    # A sum is finite exactly when all its terms are: logits are far from float32's limit.
    finite = torch.isfinite(logits.sum(-1)).tolist()
    best = logits.argmax(-1).tolist()
    return [
        _choose(logits[row], best[row], draw) if finite[row] else Choice(None)
        for row, draw in enumerate(draws)
    ]


def known(choices: list[Choice]) -> Chosen:
    """Choices that are made, as those are that are still to be read."""
    tokens = [-1 if choice.token_id is None else choice.token_id for choice in choices]
    return Chosen(torch.tensor(tokens, dtype=torch.int64), lambda: choices)


def _choose(logits: Tensor, best: int, draw: Draw) -> Choice:
    params, changed = draw.params, logits
    if not draw.is_plain:
        if changes_logits(params):
            changed = penalized(logits, params, draw.prompt, draw.answer)
        changed = masked(changed, draw.allowed, draw.barred)
        best = int(changed.argmax())
        if not math.isfinite(float(changed[best])):
            return Choice(None, fault=NOTHING_LEFT)
    token = best if params.temperature == 0 else _draw(changed, params, draw.generator)
    if params.logprobs is None:
        return Choice(token)
    (logprob,) = token_logprobs(logits[None], [token], params.logprobs)
    return Choice(token, logprob)


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw from the softmax of logits / temperature, cut to those likely enough beside the best,
    then to the top k and then to the nucleus p.

    One uniform number of the request's own generator is turned into a token by the inverse of the
    cumulative distribution (nucleus: Holtzman et al. 2020, arXiv 1904.09751).
    """
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    # Shifted first, so that a tiny temperature overflows to -inf and not to inf.
    scaled = (logits.double() - logits.max()) / params.temperature
    if params.min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(params.min_p), -torch.inf)
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
    # Rounding may lead past the end: the last that is possible at all is meant.
    last = torch.searchsorted(cumulative, cumulative[-1:])
    return min(int(index), int(last))


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Of one token for each row of logits [R, vocabulary], and of the `count` most likely."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(count, dim=-1)
    return [
        TokenLogprob(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(
            tokens, chosen.tolist(), zip(ids.tolist(), values.tolist(), strict=True), strict=True
        )
    ]
