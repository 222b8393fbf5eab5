"""How likely a prompt's own tokens were."""

from collections.abc import Callable

import torch
from torch import Tensor

from infopt.core.runtime.request import Request, TokenLogprob
from infopt.core.runtime.sampler import token_logprobs

# Rows whose logits are looked at in one go: those of a long chunk would be large.
_ROWS = 64


def score(
    request: Request, hidden: Tensor, rows: range, logits_of: Callable[[Tensor], Tensor]
) -> int | None:
    """Note the log probabilities of the prompt's next tokens, from the hidden states at `rows`.

    Hidden states are [T, hidden]. Returns the first row whose logits are not finite, if there is.
    """
    count = request.params.prompt_logprobs or 0
    for start in range(rows.start, rows.stop, _ROWS):
        stop = min(start + _ROWS, rows.stop)
        logits = logits_of(hidden[start:stop])
        finite = torch.isfinite(logits.float().sum(-1)).tolist()
        sound = finite.index(False) if False in finite else len(finite)
        known = len(request.prompt_logprobs) + 1
        tokens = request.tokens[known : known + sound]
        request.prompt_logprobs += token_logprobs(logits[:sound], tokens, count)
        if sound < len(finite):
            return start + sound
    return None


def scores(request: Request) -> tuple[TokenLogprob, ...] | None:
    """What goes with the first output of the first answer, where it was asked for."""
    first = len(request.tokens) == request.prompt_length and not request.index
    asked = request.params.prompt_logprobs is not None
    return tuple(request.prompt_logprobs) if first and asked else None
