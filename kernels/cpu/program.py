"""A list of native calls over buffers that stay where they are, run as often as wanted."""

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_int64, c_void_p
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from infopt.kernels.cpu.native import Call, Native, call, in_order

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How the ops of a step name what a buffer holds."""
# Numbers that one thread is through with sooner than another could be called.
_ALONE = 1 << 12
_LINE = 64


class RoundArgs(ctypes.Structure):
    _fields_ = (
        ("rows", c_void_p), ("x", c_void_p), ("rounded", c_void_p), ("rounded_stride", c_int64),
        ("width", c_int64),
    )  # fmt: skip


class Count:
    """How many rows of their buffers, of `capacity`, some ops work on; set before each run."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.number = torch.zeros(1, dtype=torch.int64)

    def set(self, rows: int) -> None:
        assert 0 <= rows <= self.capacity
        self.number.fill_(rows)


class Program:
    """Calls appended one by one, each after the ones before; replayed in one native call.

    Ops work on as many rows as `count` says that they were appended under. What a row becomes
    depends neither on `threads` nor, but for the rows of one request in attention, on the others.
    """

    def __init__(self, native: Native, capacity: int, threads: int) -> None:
        self.threads = threads
        self._native = native
        self.count = self._count = Count(capacity)
        """Of the ops that are appended from here on; at first that which `rows` is."""
        self._calls: list[Call] = []
        self._makers: dict[int, ctypes.Structure] = {}
        """By a buffer's address, the arguments of the op that was the last to fill it."""
        self._labels: list[tuple[str, int | None]] = []
        self._kept: list[Any] = []
        self._ready: ctypes.Array[Call] | None = None
        self._from = 0
        self._first: tuple[int, int] | None = None
        """Of the first weight, address and bytes."""
        self.label = ""
        """What calls are for that are appended from here on."""
        self.layer: int | None = None
        """Of which layer they are."""
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @property
    def capacity(self) -> int:
        """Of the buffers of the ops that are appended from here on."""
        return self.count.capacity

    @property
    def rows(self) -> int:
        return int(self._count.number)

    @rows.setter
    def rows(self, rows: int) -> None:
        self._count.set(rows)

    def buffer(self, *width: int) -> Tensor:
        """A float32 buffer [capacity, *width], which holds anything.

        Under a label it is the one that was given under that label before, if it is as wide: what
        is for the same in two layers does not outlive its layer, and stays in the CPU's cache.
        """
        if not self.label:
            return torch.empty(self.capacity, *width, dtype=torch.float32)
        held = self._buffers.get((self.label, width))
        if held is None:
            held = torch.empty(self.capacity, *width, dtype=torch.float32)
            self._buffers[self.label, width] = held
        return held

    def append(
        self,
        name: str,
        kind: type[ctypes.Structure],
        tensors: Mapping[str, Tensor | None],
        numbers: Mapping[str, int | float],
        *,
        parts: int,
        out: Tensor | None = None,
        changes: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Append the op `name`, its arguments of the structure `kind`, cut into `parts`.

        Where it finds how many rows there are is set here. Tensors are kept, and must be contiguous
        but for what the op knows of. `out` is what it fills, if its arguments have a place for a
        rounded copy of that; `changes` is what it fills or changes without one.
        `weight` is what it reads most of: threads that wait fetch it while earlier calls end.
        """
        held = {key: None if t is None else t.data_ptr() for key, t in tensors.items()}
        args = kind(rows=self.count.number.data_ptr(), **held, **numbers)
        self._kept += [self.count, args, *tensors.values()]
        if changes is not None:
            self._makers.pop(changes.data_ptr(), None)
        if out is not None:
            self._makers[out.data_ptr()] = args
        if weight is not None:
            self._fetch(weight)
        self._calls.append(call(self._native.op(name, kind), args, parts))
        self._labels.append((self.label or name, self.layer))
        self._ready = None

    def has(self, name: str, kind: type[ctypes.Structure]) -> bool:
        """Whether `append` knows this op on this CPU."""
        return self._native.has(name, kind)

    def _fetch(self, weight: Tensor) -> None:
        """Calls from the last that has a weight on fetch this one; those after it, the first's."""
        for each in self._calls[self._from :]:
            each.ahead, each.ahead_bytes = weight.data_ptr(), weight.nbytes
        self._first = self._first or (weight.data_ptr(), weight.nbytes)
        self._from = len(self._calls)

    def parts(self, numbers: int) -> int:
        """Into how many parts an op is cut that goes through so many numbers, all alike."""
        return max(1, min(self.threads, numbers // _ALONE))

    def rounded(self, x: Tensor) -> Tensor:
        """A bfloat16 copy of x [capacity, width], made by the op that was the last to fill x if it
        can, else by one of its own.

        Its rows lie an odd number of cache lines apart: so they do not push each other out.
        """
        lines = -(-x.shape[1] * 2 // _LINE) | 1
        key = f"{self.label} rounded", (x.shape[1],)
        copy = self._buffers.get(key)
        if copy is None:
            copy = torch.empty(self.capacity, lines * _LINE // 2, dtype=torch.bfloat16)
            self._buffers[key] = copy
        self._kept.append(copy)
        maker = self._makers.get(x.data_ptr())
        if maker is not None:
            maker.rounded, maker.rounded_stride = copy.data_ptr(), copy.stride(0)
        else:
            self.append(
                "round",
                RoundArgs,
                {"x": x, "rounded": copy},
                {"rounded_stride": copy.stride(0), "width": x.shape[1]},
                parts=self.parts(x.numel()),
            )
        return copy[:, : x.shape[1]]

    def run(self) -> None:
        """Do all that was appended, on up to `threads` threads."""
        if self._ready is None:
            for each in self._calls[self._from :]:
                each.ahead, each.ahead_bytes = self._first or (None, 0)
            self._ready = in_order(self._calls)
        self._native.run(self._ready, self.threads)

    def times(
        self, clock: Callable[[], float] = perf_counter
    ) -> dict[tuple[str, int | None], float]:
        """Seconds by label and layer of one run, call by call: a little more than `run` takes."""
        found: dict[tuple[str, int | None], float] = {}
        for label, each in zip(self._labels, self._calls, strict=True):
            began = clock()
            self._native.run_one(each, self.threads)
            found[label] = found.get(label, 0.0) + clock() - began
        return found
