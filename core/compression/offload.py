"""Where the hidden states between two blocks are kept: in memory, or on a disk."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.files import disk_faults
from infopt.core.hardware.probe import probe
from infopt.core.recipe.quantize import Offload

Store = Callable[[Tensor], Tensor]
"""Is handed a batch's states and gives them back as they are kept, on the CPU."""
_SHARE = 0.25
"""Of the free memory: what hidden states may take before they are kept on disk by themselves."""


def offloads(wanted: Offload, nbytes: int) -> bool:
    """Whether hidden states of `nbytes` in all are kept on disk."""
    match wanted:
        case "memory":
            return False
        case "disk":
            return True
        case "auto":
            return nbytes > _SHARE * probe().memory_available_bytes


def in_memory(states: Tensor) -> Tensor:
    """Keep a batch's states as they are."""
    return states.to("cpu")


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Keeps each batch's states in a file of its own in `folder`, mapped into memory.

    The file has lost its name before the states are given back: its bytes are free as soon as the
    tensor is gone, and with the process, however that ends.
    """

    folder: Path

    def __call__(self, states: Tensor) -> Tensor:
        """The same values, backed by a file. Raises ResourceError where the disk is full."""
        held = states.detach().to("cpu").contiguous()
        if not held.numel():
            return held
        file = self.folder / f"states-{secrets.token_hex(8)}.tmp"
        try:
            # Written, not mapped and filled: a full disk is an error here and a SIGBUS there.
            with disk_faults(file):
                content = held.flatten().view(torch.uint8).numpy()
                file.write_bytes(content)  # type: ignore[arg-type]  # an array is a buffer
            mapped = torch.from_file(str(file), shared=True, size=held.numel(), dtype=held.dtype)
        finally:
            file.unlink(missing_ok=True)
        return mapped.reshape(held.shape)
