"""Memory for weights that are read one after the other: large pages, no gaps.

In pages of 4 KiB a weight of a few MB is fetched ahead to a page's border only. Weights that lie as
they are read, in pages of 2 MiB, are fetched across the borders of products too.
"""

import mmap
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Panels = TypeVar("Panels")

_REGION, _PAGE, _LINE = 64 << 20, 2 << 20, 64


class Arena:
    """Takes weights in, each behind the one before; given back once none of them is in use."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, panels: Panels) -> Panels:
        """A dataclass of panels, its tensors in here."""
        held: dict[str, Any] = {
            field.name: self.place(value)
            for field in fields(panels)  # type: ignore[arg-type]
            if isinstance(value := getattr(panels, field.name), Tensor)
        }
        return replace(panels, **held)  # type: ignore[type-var]

    def place(self, tensor: Tensor) -> Tensor:
        """A copy in here, contiguous; the tensor itself where there are no large pages."""
        size = -(-tensor.nbytes // _LINE) * _LINE
        if not hasattr(mmap, "MADV_HUGEPAGE") or not size:
            return tensor
        if size > len(self._free):
            self._free = region(max(_REGION, size))
        copy = self._free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._free = self._free[size:]
        return copy.copy_(tensor)


def region(size: int) -> Tensor:
    """Bytes from a page's border on; memory is taken as they are written."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: small pages then
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % _PAGE
    return whole[begin : begin + size]
