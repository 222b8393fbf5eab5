"""From many key/value heads to few: the mean of those that will be one; pure.

GQA (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245): query heads share a key/value head,
and the mean of the heads that are joined is the best beginning for training on. Neighbours are
joined, so that query heads keep the order in which they are served.
"""

import torch
from torch import Tensor


def check_groups(heads: int, groups: int) -> str | None:
    """What speaks against joining `heads` key/value heads into `groups`; None where nothing."""
    if groups < 1:
        return f"there must be one key/value head at least, not {groups}"
    if groups > heads:
        return f"the model has {heads} key/value heads: they cannot become {groups}"
    if heads % groups:
        fits = [number for number in range(1, heads + 1) if heads % number == 0]
        return (
            f"{heads} key/value heads cannot be joined into {groups} of equal size; "
            f"what divides them: {', '.join(map(str, fits))}"
        )
    return None


def pool_heads(value: Tensor, heads: int, groups: int) -> Tensor:
    """The mean of each group of neighbouring heads: [heads * d, ..] to [groups * d, ..].

    A projection's weight [heads * d, K] or its bias [heads * d]; its dtype stays. As many groups as
    heads come out as they are, and so do heads that are equal.
    """
    if groups == heads:
        return value
    apart = _apart(value, heads)
    apart = apart.reshape(groups, heads // groups, *apart.shape[1:])
    # Differences from the first: the mean of equals is that number, where a sum might be rounded.
    wide = apart.to(torch.promote_types(value.dtype, torch.float32))
    mean = wide[:, 0] + (wide - wide[:, :1]).mean(1)
    return mean.reshape(-1, *value.shape[1:]).to(value.dtype)


def spread_heads(value: Tensor, heads: int, groups: int) -> Tensor:
    """Each of `groups` heads as often as the heads it stands for: [groups * d, ..] to [heads * d,
    ..]. A model with these computes what the one with `value` does."""
    return _apart(value, groups).repeat_interleave(heads // groups, dim=0).flatten(0, 1)


def pool_rows(value: Tensor, heads: int, groups: int, *, before: int = 0) -> Tensor:
    """As `pool_heads`, of a fused projection: `before` rows of queries stay, keys then values
    follow, half of the rest each. [before + 2 heads d, ..] to [before + 2 groups d, ..]."""
    queries, keys, values = _thirds(value, before)
    pooled = (pool_heads(part, heads, groups) for part in (keys, values))
    return torch.cat([queries, *pooled])


def spread_rows(value: Tensor, heads: int, groups: int, *, before: int = 0) -> Tensor:
    """As `spread_heads`, of a fused projection."""
    queries, keys, values = _thirds(value, before)
    return torch.cat([queries, *(spread_heads(part, heads, groups) for part in (keys, values))])


def within_groups(value: Tensor, heads: int, groups: int) -> float:
    """How far heads are from the mean of their group: ||W - mean||^2 / ||W||^2, 0 for equals."""
    wide = value.double()
    mean = spread_heads(pool_heads(wide, heads, groups), heads, groups)
    power = float(wide.square().sum())
    return float((wide - mean).square().sum()) / power if power else 0.0


def _apart(value: Tensor, heads: int) -> Tensor:
    """[heads * d, ..] as [heads, d, ..]."""
    if value.shape[0] % heads:
        raise ValueError(f"{value.shape[0]} rows are not of {heads} heads")
    return value.reshape(heads, value.shape[0] // heads, *value.shape[1:])


def _thirds(value: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection."""
    rest = value.shape[0] - before
    if rest <= 0 or rest % 2:
        raise ValueError(f"{rest} rows after the queries are not keys and as many values")
    queries, keys, values = torch.split(value, [before, rest // 2, rest // 2])
    return queries, keys, values
