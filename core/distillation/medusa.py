"""Medusa heads: what a head computes, what it should have said, and its loss; pure.

Medusa-1 (Cai et al., 2024, https://arxiv.org/abs/2401.10774): beside the base model's own head,
which predicts the token t+1 from the last hidden state of token t, head k = 1, 2, .. predicts the
token t+k+1 from that same state. The base stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY = 0.8
"""Head k has the weight 0.8^k in the loss: the further ahead, the less can be known."""
NOTHING = -1
"""In the place of a token that is not known: it has no share of the loss or of a count."""
_CHUNK_BYTES = 64 << 20
_RIDGE = 1e-3

Layers = Sequence[tuple[Tensor, Tensor]]
"""A head's layers, first to last: weight [h, h] and bias [h]."""


@dataclass(frozen=True, slots=True)
class Projection:
    """From states [.., h] to logits [.., V]: the base's lm_head, or a head's own copy of it."""

    weight: Tensor
    """[V, h]"""
    bias: Tensor | None = None
    softcap: float | None = None
    """Logits are softcap * tanh(logits / softcap), as in Gemma 2."""
    scale: float = 1.0

    def logits(self, states: Tensor) -> Tensor:
        """In float32 at least."""
        found = F.linear(states.to(self.weight.dtype), self.weight, self.bias)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if self.scale != 1.0:
            found = found * self.scale
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)


def head_states(states: Tensor, layers: Layers) -> Tensor:
    """What a head makes of the base's last states [.., h]: x + SiLU(W x + b), layer after layer.

    With W = 0 and b = 0 it hands them on as they are, so that a head begins as the base's own.
    """
    for weight, bias in layers:
        states = states + F.silu(F.linear(states, weight, bias))
    return states


def foresight(gram: Tensor, cross: Tensor) -> Tensor:
    """The linear map [h, h] that foretells a state further on with the least squared error.

    gram: the sum of x_t x_t^T; cross: the sum of x_(t+k) x_t^T, both float64 [h, h]. lm_head after
    that map is a better first guess at a token further on than lm_head itself: it need not unlearn
    the next token first.
    """
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(gram + ridge.to(gram.device), cross.T)
    return found.T


def ahead(follow: Tensor, k: int) -> Tensor:
    """From the token after each position, [.., L], the one k further on; NOTHING past the end."""
    return F.pad(follow[..., k:], (0, min(k, follow.shape[-1])), value=NOTHING)


def following(tokens: Tensor) -> Tensor:
    """The token after each position of a text [.., L]; NOTHING after the last."""
    return ahead(tokens, 1)


@torch.no_grad()
def guesses(states: Tensor, projection: Projection, top: int) -> Tensor:
    """The `top` likeliest tokens at each position, likeliest first: int64 [.., top]."""
    rows = states.flatten(0, -2)
    found = [projection.logits(part).topk(top).indices for part in _chunks(rows, projection)]
    return torch.cat(found).view(*states.shape[:-1], top)


def cross_entropy(states: Tensor, projection: Projection, targets: Tensor) -> Tensor:
    """The mean of -log p(target) in nats over states [.., h] whose target is a token.

    Gradients reach the states and, where it requires one, the projection's weight. Logits are made
    by chunks, and their gradient with them: there are never more of them than 64 MiB.
    """
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        states.flatten(0, -2), projection.weight, projection, targets.flatten()
    )
    return loss


def medusa_loss(losses: Sequence[Tensor]) -> Tensor:
    """The sum over heads k = 1, 2, .. of 0.8^k times the head's cross-entropy."""
    return torch.stack([DECAY**k * loss for k, loss in enumerate(losses, 1)]).sum()


def ranks(guessed: Tensor, targets: Tensor) -> Tensor:
    """The place of each target [..] among the guesses [.., top]: 0 for the first.

    `top` where it is not among them, and NOTHING where there is no target.
    """
    equal = guessed == targets[..., None]
    place = torch.where(equal.any(-1), equal.int().argmax(-1), guessed.shape[-1])
    return torch.where(targets >= 0, place, NOTHING)


def share_within(places: Tensor, top: int) -> float:
    """The share of the targets that were among the first `top` guesses; 0 where there are none."""
    counted = places[places >= 0]
    return float((counted < top).double().mean()) if len(counted) else 0.0


def mean_run(places: Sequence[Tensor]) -> float:
    """How many heads in a row, from the first, guess right on average, where all have a target.

    `places`: the ranks of each head's targets, of one shape. A step that verifies the heads' first
    guesses gains that many tokens.
    """
    known = torch.stack([place >= 0 for place in places]).all(0)
    if not bool(known.any()):
        return 0.0
    right = torch.stack([place[known] == 0 for place in places])
    return float(right.long().cumprod(0).sum(0).double().mean())


def commonest(seen: Tensor, count: int) -> Tensor:
    """The `count` most frequent tokens of `seen`, in their own order: int64; fewer if it has fewer.

    Heads that choose among these alone cost a fraction, in training and in decoding, and miss only
    what is rare (Zhao et al., 2025, https://arxiv.org/abs/2502.14856).
    """
    often = torch.bincount(seen.flatten())
    found: Tensor = often.topk(min(count, int((often > 0).sum()))).indices
    return found.sort().values


def places_of(tokens: Tensor, vocabulary: int) -> Tensor:
    """Where each token id stands among `tokens`, int64 [vocabulary]; NOTHING where it does not."""
    found = torch.full((vocabulary,), NOTHING, dtype=torch.int64, device=tokens.device)
    found[tokens] = torch.arange(len(tokens), device=tokens.device)
    return found


def unigram_share(seen: Tensor, targets: Tensor, top: int, vocabulary: int) -> float:
    """How often a target is one of the `top` most frequent tokens of `seen`: the least to beat."""
    frequent = torch.bincount(seen.flatten(), minlength=vocabulary).topk(top).indices
    counted = targets[targets >= 0]
    if not len(counted):
        return 0.0
    return float(torch.isin(counted, frequent).double().mean())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, projection: Projection, targets: Tensor
    ) -> Tensor:
        counted = max(1, int((targets >= 0).sum()))
        wide = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        leaf = weight.detach().requires_grad_(ctx.needs_input_grad[1])
        mine = replace(projection, weight=leaf)
        by_state = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        wanted = torch.split(targets, _rows(projection))
        found = [] if by_state is None else list(torch.split(by_state, _rows(projection)))
        for index, part in enumerate(_chunks(states, projection)):
            rows = part.detach().requires_grad_(by_state is not None)
            with torch.enable_grad():
                each = F.cross_entropy(
                    mine.logits(rows), wanted[index], ignore_index=NOTHING, reduction="sum"
                )
                loss = each / counted
            total += loss.detach()
            if not loss.requires_grad:
                continue
            leaves = [x for x in (rows, leaf) if x.requires_grad]
            grads = list(torch.autograd.grad(loss, leaves))
            if by_weight is not None:
                by_weight += grads.pop()
            if by_state is not None:
                found[index].copy_(grads.pop())
        ctx.save_for_backward(by_state, by_weight)
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_state, by_weight = ctx.saved_tensors
        (scale,) = grads
        return (
            None if by_state is None else by_state * scale.to(by_state.dtype),
            None if by_weight is None else by_weight * scale,
            None,
            None,
        )


def _chunks(rows: Tensor, projection: Projection) -> tuple[Tensor, ...]:
    return torch.split(rows, _rows(projection))


def _rows(projection: Projection) -> int:
    """How many rows have logits of `_CHUNK_BYTES` in float32."""
    return max(1, _CHUNK_BYTES // (4 * len(projection.weight)))
