"""By what of a product its tile is chosen."""

import torch

from infopt.kernels.gpu.tile import Key, power_of_two

MOST_ROWS = 4096
FIXED_ROWS = 16
"""Rows that tiles of products whose rows must not depend on one another are chosen for."""


def product_key(
    count: int, outputs: int, inputs: int, dtype: torch.dtype, *, fixed: bool, **more: int
) -> Key:
    """Rows by powers of two, so that tiles measured for some serve for all; `fixed`: the same key
    for any number of them."""
    return {
        "m": FIXED_ROWS if fixed else min(power_of_two(count), MOST_ROWS),
        "n": outputs,
        "k": inputs,
        "dtype": str(dtype).removeprefix("torch."),
        "fixed": int(fixed),
        **more,
    }
