"""Steps that were recorded once, and are replayed with no Python between their kernels.

On a CPU a program is a native list of calls. A step that wants logits and nothing else is replayed
where there is a program; all others are computed part by part.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.models.record import Rows, Size, Unrecordable, record
from infopt.kernels.cpu import attention
from infopt.kernels.cpu.attention import Heads
from infopt.kernels.cpu.native import Native, threads_at_hand
from infopt.kernels.cpu.program import Program

MOST_ROWS = 1024
"""Beyond, a step is computed part by part: its buffers would take too much memory."""
_MOST_UNPACKED_ROWS = 8
"""Where weights lie as products of few rows want them."""
_SMALL_ROWS = 32
"""Up to so many, a step has a program of its own, so that it need not be cut as a large one is."""
_FEWEST_BLOCKS = 16


class StepProgram(Protocol):
    """A step of no more tokens and blocks than it has room for."""

    def replay(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor:
        """Logits float32 [R, vocabulary] of the tokens at `wanted` int64 [R], or of all; good until
        the next replay.

        The caches are filled as an ordinary step fills them.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step's parts."""

    operators: dict[str, float]
    layers: tuple[float, ...]


# What a profile calls that which has another label.
_OPERATORS = {
    "positions": "embedding",
    "embedding, scaled": "embedding",
    "project_in": "projections",
    "project_out": "projections",
    "chosen": "lm_head",
}


class NativeStep:
    """A `StepProgram` on a CPU."""

    def __init__(
        self,
        native: Native,
        decoder: Decoder,
        caches: Sequence[Tensor],
        size: Size,
        threads: int,
    ) -> None:
        """Record; raises Unrecordable for a decoder with a part that has no native op."""
        self.size, self.threads = size, threads
        # Not of inference mode, or nobody could write into the buffers outside of that.
        with torch.inference_mode(False):
            self._program = Program(native, size.rows, threads)
            self._rows = Rows.empty(size)
            self._tables, self._owners = self._rows.tables.numpy(), self._rows.owners.numpy()
            self._every = torch.arange(size.rows)
            self._result = record(decoder, self._program, size, self._rows, caches)

    @property
    def packed(self) -> bool:
        """Whether all weights lie as products of many rows want them."""
        return self._result.packed

    def replay(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor:
        count = self._fill(inputs, wanted)
        self._program.run()
        return self._result.logits[:count]

    def times(self, inputs: StepInputs, wanted: Tensor | None = None) -> StepTimes:
        """What one replay takes, its calls made one by one."""
        self._fill(inputs, wanted)
        operators: dict[str, float] = defaultdict(float)
        layers: dict[int, float] = defaultdict(float)
        for (label, layer), seconds in self._program.times().items():
            operators[_OPERATORS.get(label, label)] += seconds
            if layer is not None:
                layers[layer] += seconds
        return StepTimes(dict(operators), tuple(layers[n] for n in sorted(layers)))

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
        config = decoder.config
        self._shape = Heads(config.heads, config.kv_heads, config.head_dim)
        self._small = self._record(Size(rows=1, wanted=1, alone=1, width=_FEWEST_BLOCKS))
        self._large: NativeStep | None = None
        self._most = MOST_ROWS if self._small.packed else _MOST_UNPACKED_ROWS

    def step_for(self, inputs: StepInputs, wanted: Tensor | None) -> NativeStep | None:
        """The program of a step; None where it has more rows than programs have."""
        rows, plan = len(inputs.token_ids), inputs.plan
        if rows > self._most:
            return None
        needed = Size(
            rows,
            rows if wanted is None else len(wanted),
            attention.alone(plan.lengths, self._shape),
            max(map(len, plan.tables)),
        )
        if rows <= _SMALL_ROWS:
            self._small = self._with_room(self._small, needed)
            return self._small
        self._large = self._with_room(self._large, needed)
        return self._large

    def _with_room(self, step: NativeStep | None, needed: Size) -> NativeStep:
        """The step, or a larger one in its place."""
        held = needed if step is None else step.size
        both = zip(astuple(held), astuple(needed), strict=True)
        size = Size(*(max(have, _at_least(wants)) for have, wants in both))
        if step is None or size != held or _threads() != step.threads:
            return self._record(size)
        return step

    def _record(self, size: Size) -> NativeStep:
        return NativeStep(self._native, self._decoder, self._caches, size, _threads())


class Steps(Protocol):
    """Programs of several sizes."""

    def step_for(self, inputs: StepInputs, wanted: Tensor | None) -> StepProgram | None:
        """The program of a step; None where there is none for it."""
        ...


class Replays:
    """The steps of a decoder that are replayed, and how many were; or why none is."""

    def __init__(self, steps: Steps | None, reason: str | None = None) -> None:
        self._steps, self.reason = steps, reason
        self.count = 0
        self.program: StepProgram | None = None
        """Of the last step, if it was replayed."""

    def logits(self, inputs: StepInputs, wanted: Tensor | None = None) -> Tensor | None:
        """As `StepProgram.replay`; None for a step that is to be computed part by part."""
        self.program = None if self._steps is None else self._steps.step_for(inputs, wanted)
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


@dataclass(frozen=True, slots=True)
class Room:
    """What recorded steps of a GPU must have room for."""

    rows: int
    context: int
    """Tokens of a request."""


def captured(decoder: Decoder, caches: Sequence[Tensor], room: Room | None) -> Replays:
    """The decode steps of a decoder on a GPU as CUDA graphs, where they can be captured."""
    if decoder.card is None:
        return Replays(None, "torch's kernels are used on this GPU")
    if room is None:
        return Replays(None, "no step is to be recorded")
    # Here, so that a CPU need not have Triton.
    from infopt.core.runtime.card_steps import CardSteps

    try:
        with torch.inference_mode():
            return Replays(CardSteps(decoder, caches, rows=room.rows, context=room.context))
    except RuntimeError as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Replays(None, f"the decoder cannot be captured: {why}")


def _threads() -> int:
    """As many as torch has, but no more than there are cores: here too many would wait in turn."""
    return min(torch.get_num_threads(), threads_at_hand())


def _at_least(number: int) -> int:
    """The power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()
