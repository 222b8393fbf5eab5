"""Scheduled work as the tensors of one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from infopt.core.models.decoder import StepInputs
from infopt.core.runtime.request import Request
from infopt.core.runtime.scheduler import Work
from infopt.kernels.attention.paged import plan_attention


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `start + len(tokens)` of a sequence that owns `blocks`."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows of a step whose hidden states tell of the request's prompt."""

    request: Request
    rows: range


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: what the decoder reads, and the rows whose logits are wanted."""

    inputs: StepInputs
    rows: Tensor | None
    """int64 [R], in the order of `sampling`; None where every row is wanted."""
    sampling: tuple[Work, ...]
    reading: tuple[Reading, ...]


def build_batch(
    work: Sequence[Work], *, block_size: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Lay the scheduled tokens behind one another, as attention wants them.

    Single tokens come first, those with the shortest contexts before the others.
    """
    ordered = sorted(work, key=lambda item: (item.tokens > 1, item.request.computed))
    spans = [
        Span(
            item.request.tokens[item.request.computed : item.request.computed + item.tokens],
            item.request.computed,
            item.request.blocks,
        )
        for item in ordered
    ]
    ends = list(accumulate(item.tokens for item in ordered))
    wanted = [end - 1 for item, end in zip(ordered, ends, strict=True) if item.samples]
    return Batch(
        inputs=step_inputs(spans, block_size=block_size, dtype=dtype, device=device),
        rows=None if len(wanted) == ends[-1] else _sent(wanted, device),
        sampling=tuple(item for item in ordered if item.samples),
        reading=tuple(
            Reading(item.request, rows)
            for item, end in zip(ordered, ends, strict=True)
            if (rows := _read_rows(item, end))
        ),
    )


def _read_rows(item: Work, end: int) -> range:
    """Rows, of those that end before `end`, that tell of the request's prompt."""
    first, wanted = item.request.computed, item.request.unread
    start, stop = max(first, wanted.start), min(first + item.tokens, wanted.stop)
    shift = end - item.tokens - first
    return range(start + shift, max(start, stop) + shift)


def _sent(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 on a device: one copy, to a GPU from pinned memory, for which nobody waits."""
    pinned = device.type == "cuda"
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=pinned)


def step_inputs(
    spans: Sequence[Span], *, block_size: int, dtype: torch.dtype, device: torch.device
) -> StepInputs:
    """The tensors of a step over `spans`, those of a single token first."""
    positions = [position for span in spans for position in range(span.start, span.end)]
    slots = [
        span.blocks[position // block_size] * block_size + position % block_size
        for span in spans
        for position in range(span.start, span.end)
    ]
    ids = [token for span in spans for token in span.tokens]
    numbers = _sent([ids, positions, slots], device)
    return StepInputs(
        token_ids=numbers[0],
        positions=numbers[1],
        slots=numbers[2],
        plan=plan_attention(
            [span.blocks for span in spans],
            [span.end for span in spans],
            [0, *accumulate(len(span.tokens) for span in spans)],
            block_size,
            dtype,
            device,
        ),
    )
