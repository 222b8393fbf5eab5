"""Choose the next token of each request on a GPU: all rows in one launch, and one wait for them,
which may come later.

Importing this imports Triton: only where a decoder has a card.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infopt.core.runtime.penalties import changes_logits, masked, penalized
from infopt.core.runtime.sampler import NOTHING_LEFT, Choice, Chosen, Draw, token_logprobs
from infopt.kernels.gpu import sample as kernel
from infopt.kernels.gpu.sample import Choosing
from infopt.kernels.gpu.tile import Card


def sample_on_card(card: Card, logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """As `sampler.sample`: the same distributions, and the same tokens where there is one choice.

    The uniform number of a draw is its generator's, but tokens lie in the order of the vocabulary
    here, so that a seed gives another answer than on a CPU.
    """
    return sample_later(card, logits, draws).read() if draws else []


@torch.inference_mode()
def sample_later(card: Card, logits: Tensor, draws: Sequence[Draw]) -> Chosen:
    """The same, launched; nothing waits before it is read."""
    logits = logits.float()
    changed = logits
    if not all(draw.is_plain for draw in draws):
        changed = torch.stack([_changed(logits[row], draw) for row, draw in enumerate(draws)])
    tokens = kernel.sample(card, changed, _choosing(draws, logits.device))
    # A sum is finite exactly when all its terms are: logits are far from float32's limit.
    finite = torch.isfinite(logits.sum(-1))
    found = torch.where(finite, tokens, kernel.NOT_FINITE)
    arriving = _arriving(found)

    def read() -> list[Choice]:
        with torch.inference_mode():
            each = zip(arriving(), draws, strict=True)
            return [_choice(logits[row], *one) for row, one in enumerate(each)]

    return Chosen(found, read)


def _arriving(tokens: Tensor) -> Callable[[], list[int]]:
    """Tokens on their way to the host: from a GPU into pinned memory, behind what they wait for and
    before whatever is launched next."""
    if not tokens.is_cuda:
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def read() -> list[int]:
        event.synchronize()
        return host.tolist()

    return read


def _changed(logits: Tensor, draw: Draw) -> Tensor:
    if changes_logits(draw.params):
        logits = penalized(logits, draw.params, draw.prompt, draw.answer)
    return masked(logits, draw.allowed, draw.barred)


def _choosing(draws: Sequence[Draw], device: torch.device) -> Choosing:
    numbers = torch.tensor(
        [
            (
                draw.params.temperature,
                draw.params.top_p,
                math.log(draw.params.min_p) if draw.params.min_p > 0 else -math.inf,
                _uniform(draw),
            )
            for draw in draws
        ],
        dtype=torch.float64,
    ).float()
    temperature, top_p, log_min_p, uniform = _sent(numbers.t().contiguous(), device)
    ks = torch.tensor([draw.params.top_k for draw in draws], dtype=torch.int32)
    top_k = _sent(ks, device)
    # Rounded to float32, a number just below 1 must not become 1.
    return Choosing(temperature, top_k, top_p, log_min_p, uniform.clamp(max=1 - 2**-24))


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Onto the device; to a GPU from pinned memory, for from any other a copy waits for the step
    that is under way."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def _uniform(draw: Draw) -> float:
    """None is drawn where the token is the likeliest: as on a CPU."""
    if draw.params.temperature == 0:
        return 0.0
    return torch.rand((), generator=draw.generator, dtype=torch.float64).item()


def _choice(logits: Tensor, token: int, draw: Draw) -> Choice:
    if token == kernel.NOT_FINITE:
        return Choice(None)
    if token == kernel.NONE_LEFT:
        return Choice(None, fault=NOTHING_LEFT)
    if draw.params.logprobs is None:
        return Choice(token)
    (logprob,) = token_logprobs(logits[None], [token], draw.params.logprobs)
    return Choice(token, logprob)
