"""Weights in an arena: what they were, behind one another, each for itself."""

import mmap
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from infopt.kernels.cpu.arena import Arena

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages here: weights stay where they are"
)


@dataclass(frozen=True)
class Panels:
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    outputs: int


def test_panels_keep_what_they_held() -> None:
    given = Panels(torch.randint(-99, 99, (3, 5), dtype=torch.int8), torch.randn(7), None, 3)
    taken = Arena().take(given)
    assert torch.equal(taken.codes, given.codes) and torch.equal(taken.scales, given.scales)
    assert taken.codes.data_ptr() != given.codes.data_ptr()
    assert (taken.zeros, taken.outputs) == (None, 3)


def test_tensors_lie_behind_one_another() -> None:
    arena = Arena()
    first, second = (arena.place(torch.full((100,), float(n))) for n in (1, 2))
    assert first.data_ptr() % (2 << 20) == 0
    assert second.data_ptr() - first.data_ptr() == 448  # 400 bytes, in whole lines
    second.fill_(7.0)
    assert first.eq(1.0).all()


def test_a_tensor_larger_than_a_region_and_one_of_nothing() -> None:
    arena = Arena()
    before = arena.place(torch.ones(3))
    large = arena.place(torch.arange(9 << 20))  # 72 MiB
    after = arena.place(torch.ones(3, dtype=torch.bfloat16).view(1, 3))
    assert large[-1] == (9 << 20) - 1 and before.eq(1).all() and after.tolist() == [[1.0] * 3]
    assert arena.place(torch.empty(0, 4)).shape == (0, 4)


def test_a_strided_tensor_becomes_contiguous() -> None:
    given = torch.arange(12).view(3, 4).t()
    placed = Arena().place(given)
    assert placed.is_contiguous() and torch.equal(placed, given)
