"""A prompt's hidden states into its embedding, as they come."""

from collections.abc import Callable

import torch
from torch import Tensor

from infopt.core.runtime.request import Request


def pool(
    request: Request, hidden: Tensor, rows: range, states_of: Callable[[Tensor], Tensor]
) -> int | None:
    """Add up the states of the prompt's next tokens, from the hidden states at `rows`.

    Hidden states are [T, hidden]. Returns the first row that is not finite, if there is.
    """
    # In float64, so that the sum hardly knows of its order, which chunks change.
    states = states_of(hidden[rows.start : rows.stop]).double()
    finite = torch.isfinite(states).all(-1).tolist()
    sound = finite.index(False) if False in finite else len(finite)
    total = states[:sound].sum(0)
    request.pool = total if request.pool is None else request.pool + total
    request.pooled = request.unread.start + sound
    return None if sound == len(rows) else rows.start + sound


def embedding(request: Request) -> tuple[float, ...] | None:
    """The pooled states at length 1; None as long as some are missing."""
    if request.pool is None or request.pooled < request.prompt_length:
        return None
    # The length of a mean is that of the sum, but for a factor that goes away here.
    return tuple(torch.nn.functional.normalize(request.pool, dim=0).float().tolist())
