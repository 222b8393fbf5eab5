"""Several processes that train one model, as torchrun starts them: one a device.

Each takes its share of a batch's windows; gradients are added up over all. The processes are told
of by the environment (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist
from torch import nn

from infopt.core.errors import UsageError

_PATIENCE = timedelta(days=1)
"""For the first process, which prepares and measures while the others wait."""


@dataclass(frozen=True, slots=True)
class Group:
    """The processes at work: this one is `rank` of `size`; tensors meet on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence[int]) -> list[int]:
        """This process's of `items`; every process has one at least.

        Raises UsageError where there are too few.
        """
        if len(items) < self.size:
            raise UsageError(
                f"a batch of {len(items)} windows cannot be shared by {self.size} processes",
                "raise batch_tokens or start fewer processes",
            )
        return list(items[self.rank :: self.size])

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over all processes, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let every gradient be its sum over all processes; None where no process has one."""
        if self.size == 1:
            return
        learning = list(parameters)
        used = self.add_up([float(parameter.grad is not None) for parameter in learning])
        for parameter, users in zip(learning, used, strict=True):
            if not users:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            # Of the same strides on every process, but not always the contiguous ones.
            whole = parameter.grad.contiguous()
            dist.all_reduce(whole)
            parameter.grad.copy_(whole)

    def agree(self, value: float) -> float:
        """The leading process's value, on every process."""
        return self.add_up([value if self.leads else 0.0])[0]


def rank() -> int:
    """This process's number; 0 where there is but one."""
    return int(os.environ.get("RANK", "0")) if _size() > 1 else 0


def local_device(device: torch.device) -> torch.device:
    """Of several GPUs the one of this process; `device` where there is but one process."""
    if device.type != "cuda" or _size() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The processes that the environment tells of, joined: NCCL on GPUs, else gloo."""
    size = _size()
    if size == 1:
        yield Group(0, 1, device)
        return
    begun = dist.is_initialized()
    if not begun:
        # An optimizer imports it, and its modules keep whatever group there is as a default: that
        # group's threads would outlive it, and now and then abort the process as it ends.
        import_module("torch._dynamo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), size, device)
    finally:
        if not begun:
            dist.destroy_process_group()


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
