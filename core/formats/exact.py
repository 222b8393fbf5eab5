"""Casts that lose nothing: a checkpoint format that allows a dtype gets exactly what was meant."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infopt.core.errors import UnsupportedError


def exact_cast(values: Tensor, dtypes: Sequence[torch.dtype], what: str) -> Tensor:
    """The values in the first of `dtypes` that holds every one of them exactly.

    Raises UnsupportedError, naming `what`, where none does.
    """
    for dtype in dtypes:
        cast = values.to(dtype)
        if torch.equal(cast.to(torch.float64), values.to(torch.float64)):
            return cast.contiguous()
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise UnsupportedError(
        f"{what} must be exact in {names}, and these are not",
        "round them before the weight is quantized, or choose another format",
    )


def in_order(group_index: Tensor, groups: int) -> bool:
    """Whether each group is a run of neighbouring input columns, all of one length."""
    columns = group_index.numel()
    expected = torch.arange(columns, device=group_index.device) * groups // columns
    return torch.equal(group_index.long(), expected)


def require_order(group_index: Tensor, groups: int, layout: str) -> None:
    """Raise UnsupportedError for groups that are spread over the row (act-order in old files)."""
    if not in_order(group_index, groups):
        raise UnsupportedError(
            f"{layout} has no place for groups of scattered columns (act-order, g_idx unsorted)",
            "the gptq format has",
        )


def round_up(scale: Tensor) -> Tensor:
    """The least bfloat16 values that are not below positive scales."""
    rounded = scale.to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, float("inf")))
    return torch.where(rounded.to(scale.dtype) < scale, above, rounded)
