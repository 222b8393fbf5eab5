"""Small steps that were recorded once, and are replayed with no Python between their kernels.

On a CPU a program is a native list of calls. A step of few tokens that wants logits and nothing
else is replayed where there is a program; all others are computed part by part.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.models.record import Rows, Unrecordable, record
from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.program import Program

MOST_ROWS = 32
"""Beyond, products are matrix by matrix, which torch does faster."""
_FEWEST_BLOCKS = 16


class StepProgram(Protocol):
    """A step of up to `capacity` tokens, of requests with up to `width` blocks."""

    capacity: int
    width: int

    def replay(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor:
        """Logits float32 [R, vocabulary] of the tokens at `wanted` int64 [R], or of all; good until
        the next replay.

        The caches are filled as an ordinary step fills them.
        """
        ...


class NativeStep:
    """A `StepProgram` on a CPU."""

    def __init__(
        self,
        native: Native,
        decoder: Decoder,
        caches: Sequence[Tensor],
        *,
        capacity: int,
        width: int,
        threads: int,
    ) -> None:
        """Record; raises Unrecordable for a decoder with a part that has no native op."""
        self.capacity, self.width, self.threads = capacity, width, threads
        # Not of inference mode, or nobody could write into the buffers outside of that.
        with torch.inference_mode(False):
            self._program = Program(native, capacity, threads)
            self._rows = Rows.empty(capacity, width)
            self._tables, self._owners = self._rows.tables.numpy(), self._rows.owners.numpy()
            self._every = torch.arange(capacity)
            self._result = record(decoder, self._program, self._rows, caches)

    def replay(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor:
        count = self._fill(inputs, wanted)
        self._program.run()
        return self._result.logits[:count]

    def times(self, inputs: StepInputs, wanted: Tensor | None = None) -> dict[str, float]:
        """Seconds by operator of one replay, its calls made one by one."""
        self._fill(inputs, wanted)
        return self._program.times()

    def _fill(self, inputs: StepInputs, wanted: Tensor | None) -> int:
        """Set what the calls read; returns of how many rows there will be logits."""
        rows, count = self._rows, len(inputs.token_ids)
        self._program.rows = count
        rows.token_ids[:count] = inputs.token_ids
        rows.positions[:count] = inputs.positions
        rows.slots[:count] = inputs.slots
        row = 0
        for number, table in enumerate(inputs.plan.tables):
            self._tables[number, : len(table)] = np.asarray(table, dtype=np.int32)
            end = row + inputs.plan.lengths[number]
            self._owners[row:end] = number
            row = end
        chosen = self._every[:count] if wanted is None else wanted
        rows.wanted[: len(chosen)] = chosen
        self._result.wanted.set(len(chosen))
        return len(chosen)


class NativeSteps:
    """Records a step when the first comes that is so large, and again when a larger one does."""

    def __init__(self, native: Native, decoder: Decoder, caches: Sequence[Tensor]) -> None:
        """Raises Unrecordable for a decoder with a part that has no native op."""
        self._native, self._decoder, self._caches = native, decoder, caches
        self._step = self._record(1, _FEWEST_BLOCKS)

    def step_for(self, inputs: StepInputs) -> NativeStep | None:
        """The program of a step; None where it has more rows than programs have."""
        step, rows = self._step, len(inputs.token_ids)
        if rows > MOST_ROWS:
            return None
        width = max(map(len, inputs.plan.tables))
        fits = rows <= step.capacity and width <= step.width
        if not fits or torch.get_num_threads() != step.threads:
            self._step = self._record(
                max(step.capacity, _at_least(rows)), max(step.width, _at_least(width))
            )
        return self._step

    def _record(self, capacity: int, width: int) -> NativeStep:
        return NativeStep(
            self._native,
            self._decoder,
            self._caches,
            capacity=capacity,
            width=width,
            threads=torch.get_num_threads(),
        )


class Replays:
    """The steps of a decoder that are replayed, and how many were; or why none is."""

    def __init__(self, steps: NativeSteps | None, reason: str | None = None) -> None:
        self._steps, self.reason = steps, reason
        self.count = 0
        self.program: NativeStep | None = None
        """Of the last step, if it was replayed."""

    def logits(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor | None:
        """As `StepProgram.replay`; None for a step that is to be computed part by part."""
        self.program = None if self._steps is None else self._steps.step_for(inputs)
        if self.program is None:
            return None
        self.count += 1
        return self.program.replay(inputs, wanted)


def recorded(native: Native | None, decoder: Decoder, caches: Sequence[Tensor]) -> Replays:
    """The decode steps of `decoder` over `caches`, where native ops can compute them."""
    if native is None:
        return Replays(None, "there are no native kernels, or they are not wanted")
    try:
        return Replays(NativeSteps(native, decoder, caches))
    except Unrecordable as error:
        return Replays(None, f"the decoder cannot be recorded: {error}")


def _at_least(number: int) -> int:
    """The power of two that is no less."""
    return 1 << (number - 1).bit_length()
