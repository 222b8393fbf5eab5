from collections.abc import Callable

import pytest
import torch

from infopt.core.formats.number import IntegerFormat, QuantizedWeight

Maker = Callable[..., QuantizedWeight]


def integer_weight(
    form: IntegerFormat,
    outputs: int,
    columns: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float16,
    lowest_zero: int = 0,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = form.groups(columns)
    zeros = torch.randint(
        lowest_zero, 2**form.bits, (outputs, groups), generator=generator, dtype=torch.uint8
    )
    if form.symmetric:
        zeros.fill_(form.middle)
    scales = torch.rand(outputs, groups, generator=generator) + 0.01
    return QuantizedWeight(
        codes=torch.randint(
            0, 2**form.bits, (outputs, columns), generator=generator, dtype=torch.uint8
        ),
        scales=scales.to(dtype),
        zeros=zeros,
        group_index=torch.arange(columns, dtype=torch.int32) // (columns // groups),
        format=form,
    )


@pytest.fixture(scope="session")
def make() -> Maker:
    """A random integer weight of a format."""
    return integer_weight
