"""Decode steps on a GPU: recorded once for each number of rows, as CUDA graphs, and replayed.

A graph reads its tokens, slots, contexts and tables from memory that stays where it is. It has
room for as many rows as the next larger bucket; rows of no request have no context, write nothing
and change no other row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infopt.core.layers.attention import Attention
from infopt.core.layers.card_attention import CardInputs, Planned, launch_of
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.kernels.gpu.paged_attention import Part
from infopt.kernels.gpu.plan import fixed_splits, splits_for
from infopt.kernels.gpu.tile import Card, cdiv

_STEP = 8


def buckets(rows: int) -> tuple[int, ...]:
    """Numbers of rows for which steps are recorded, so that up to `rows` fit: 1, 2, 4, then every
    eighth; beyond 256 every 64th, as little of so large a step is lost to padding."""
    few = [n for n in (1, 2, 4) if n < rows]
    by_step = [*range(_STEP, min(rows, 256), _STEP), *range(256, rows, 64)]
    return tuple(sorted({*few, *(n for n in by_step if n < rows), rows}))


class Recorded(Protocol):
    """Work that can be done again."""

    def __call__(self) -> None:
        """Over the same memory, with what lies in it now."""
        ...


Record = Callable[[Callable[[], Tensor]], tuple[Recorded, Tensor]]
"""Does work once and returns how to do it again, and where its result will lie."""


def cuda_graph(work: Callable[[], Tensor]) -> tuple[Recorded, Tensor]:
    """Warmed up first, which compiles what is not compiled, then captured."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a step reads, in one piece of memory on the device and one like it on the host."""

    numbers: Tensor
    """int64 [3, rows]: tokens, positions, slots."""
    contexts: Tensor
    """int32 [rows]"""
    tables: Tensor
    """int32 [rows, width]"""

    @classmethod
    def over(cls, memory: Tensor, rows: int) -> "_Rows":
        """Views of int32 memory, as `size` has it."""
        numbers = memory[: 6 * rows].view(torch.int64).view(3, rows)
        return cls(numbers, memory[6 * rows : 7 * rows], memory[7 * rows :].view(rows, -1))

    @staticmethod
    def size(rows: int, width: int) -> int:
        return 7 * rows + rows * width


class CardStep:
    """A `StepProgram` of single tokens, for up to `rows` requests of `width` blocks."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[Tensor],
        rows: int,
        width: int,
        record: Record,
    ) -> None:
        assert decoder.card is not None
        device = decoder.device
        self.rows = rows
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):
            size = _Rows.size(rows, width)
            self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._there = torch.zeros(size, dtype=torch.int32, device=device)
        self._on_host, found = _Rows.over(self._host, rows), _Rows.over(self._there, rows)
        self._on_host.numbers[2] = -1
        self._there.copy_(self._host)
        plan = _StaticPlan(decoder.card, found, width * caches[0].shape[1], device)

        def work() -> Tensor:
            ids, positions, slots = found.numbers
            angles = decoder.angles(positions)
            inputs = CardInputs(plan.card, angles, slots, plan)
            x = decoder.embed(_Tokens(ids, positions))
            return decoder.logits(decoder.through(x, inputs, caches)).float()

        self._again, self._logits = record(work)

    def replay(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor:
        """As `StepProgram` has it; nothing here waits for the device."""
        count = len(inputs.plan.lengths)
        self._fill(inputs, count)
        self._again()
        logits = self._logits[:count]
        return logits if wanted is None else logits.index_select(0, wanted)

    def _fill(self, inputs: StepInputs, count: int) -> None:
        host = self._on_host
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: long done where its tokens are known
        host.contexts.zero_()
        host.contexts[:count] = torch.tensor(inputs.plan.contexts, dtype=torch.int32)
        for row, table in enumerate(inputs.plan.tables):
            host.tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        self._there.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        numbers = _Rows.over(self._there, self.rows).numbers
        for row, values in zip(
            numbers, (inputs.token_ids, inputs.positions, inputs.slots), strict=True
        ):
            row[:count].copy_(values, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Tokens:
    token_ids: Tensor
    positions: Tensor


class _StaticPlan:
    """One launch, over rows that stay where they are; its splits do not know the contexts."""

    def __init__(self, card: Card, rows: _Rows, most: int, device: torch.device) -> None:
        """most: tokens that a context may have."""
        self.card, self._rows, self._most = card, rows, most
        count = len(rows.contexts)
        self._starts = torch.arange(count + 1, dtype=torch.int32, device=device)
        self._tiles = torch.stack((self._starts[:-1], torch.zeros_like(self._starts[:-1])), dim=1)

    def launches(self, layer: Attention, held: torch.dtype) -> Sequence[Planned]:
        tile = launch_of(layer, held, 1).tile(self.card)
        seen = min(self._most, layer.window or self._most)
        splits = (
            fixed_splits(self._most)
            if layer.fixed
            else splits_for(
                self.card,
                programs=len(self._tiles) * layer.kv_heads,
                context=seen,
                block_n=tile.constants["BLOCK_N"],
            )
        )
        rows = self._rows
        part = Part(self._tiles, self._starts, rows.contexts, rows.tables, splits, layer.fixed)
        return (Planned(slice(None), part, tile),)


class CardSteps:
    """The recorded steps of a decoder, one for each bucket: recorded when it is made."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[Tensor],
        *,
        rows: int,
        context: int,
        record: Record = cuda_graph,
    ) -> None:
        """For up to `rows` requests of up to `context` tokens.

        Raises RuntimeError for a decoder with a part that cannot be captured.
        """
        # A multiple of 16, as in plans that are made for a step, so that kernels are the same.
        self._width = cdiv(cdiv(context, caches[0].shape[1]), 16) * 16
        # Largest first: the smaller ones find their memory free.
        made = [
            CardStep(decoder, caches, size, self._width, record) for size in reversed(buckets(rows))
        ]
        self._steps = made[::-1]

    def step_for(self, inputs: StepInputs, wanted: Tensor | None) -> CardStep | None:
        """The smallest that has room for a step of single tokens; None for any other step."""
        plan = inputs.plan
        count = len(plan.lengths)
        if plan.single != count or max(map(len, plan.tables)) > self._width:
            return None
        return next((step for step in self._steps if step.rows >= count), None)
