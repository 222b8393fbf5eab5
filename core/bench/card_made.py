"""One op of a GPU's kernels over inputs that are there, beside torch's ways to the same result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
UNIT = 2**-7
"""Of bfloat16's last place, and the rounding of a weight on the way to the library's product."""
INT8_STEP, FLOAT8_STEP = 1 / 127, 1 / 14
"""What one step of a rounding is of the largest value."""
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Made:
    """One copy of an op's inputs, and the calls over them."""

    ours: Work
    torchs: Mapping[str, Work]
    """Which of them this GPU and this torch can do is found out by trying."""
    error: Callable[[], float]
    """Calls ours once, on inputs as they were made; the largest difference from a float64
    reference, as a share of its largest value."""
    nbytes: int
    """Read and written by a call of ours."""
    flops: float = 0.0
    same: Callable[[object], Tensor] | None = None
    """What torch's ways return, as ours returns it: held to ours where it is told."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Torch's ways that can be raced, and why the others cannot."""

    works: Mapping[str, Work]
    left_out: Mapping[str, str] = field(default_factory=dict)


def near(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value wanted; infinite where one is NaN."""
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    return error if error == error else float("inf")


def ways(
    name: str, work: Callable[..., object], *inputs: Any, device: torch.device
) -> dict[str, Work]:
    """Torch's own, op by op, and on a GPU what torch.compile makes of it."""
    found: dict[str, Work] = {name: partial(work, *inputs)}
    if device.type == "cuda":
        compiled: Callable[..., object] = torch.compile(work, dynamic=False)
        found[f"{name}, compiled"] = partial(compiled, *inputs)
    return found


def standing(made: Made, tolerance: float) -> Standing:
    """Try each of torch's ways once; to be called after `error`, which wants its inputs untouched.

    One that raises, or whose result is further from ours than twice `tolerance` and what a
    rounding to 8 bits may be, is left out: what computes something else is no alternative.
    """
    works: dict[str, Work] = {}
    left_out: dict[str, str] = {}
    for name, work in made.torchs.items():
        try:
            found = work()
            if made.same is not None:
                ours = made.ours()
                assert isinstance(ours, Tensor)
                error = near(made.same(found), ours.double())
                if error > 2 * tolerance + 4 * UNIT:
                    left_out[name] = f"its result is {error:.1e} away"
                    continue
        except Exception as failure:  # whatever this GPU or this torch cannot do
            left_out[name] = (str(failure).splitlines() or [type(failure).__name__])[0][:200]
            continue
        works[name] = work
    return Standing(works, left_out)
