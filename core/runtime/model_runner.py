"""Run the decoder over one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infopt.core.hardware.native import find_native
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.recipe.serve import Kernels
from infopt.core.runtime.kv_cache import KVCache
from infopt.core.runtime.prefix_store import PrefixStore
from infopt.core.runtime.sampler import Choice, Chosen, Draw, known, sample
from infopt.core.runtime.scheduler import Step
from infopt.core.runtime.step_program import Replays, Room, captured, recorded

# Blocks that are in host memory beside the store while they are on their way to the disk.
_SAVED_AT_ONCE = 16


class ModelRunner:
    """A decoder, the cache that it fills, and where blocks go that the cache gives up.

    Steps that were recorded are replayed; without `replays` every step is computed part by part.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        store: PrefixStore | None = None,
        replays: Replays | None = None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.store = store
        self.replays = replays or Replays(None, "no step is to be recorded")
        self.ahead = decoder.card is not None
        """Whether steps are launched before the tokens of the one before are known: where a launch
        returns before its kernels are done."""

    @classmethod
    def recorded(
        cls,
        kernels: Kernels,
        decoder: Decoder,
        cache: KVCache,
        store: PrefixStore | None = None,
        room: Room | None = None,
    ) -> "ModelRunner":
        """One that replays steps: on a CPU where its native kernels are to be used and can compute
        them, on a GPU decode steps that have `room`; raises as `find_native`."""
        if decoder.device.type == "cuda":
            replays = captured(decoder, cache.layers, None if kernels == "torch" else room)
        else:
            replays = recorded(find_native(kernels), decoder, cache.layers)
        return cls(decoder, cache, store, replays)

    @torch.inference_mode()
    def move_blocks(self, step: Step) -> None:
        """Save, copy and bring back the blocks that a step wants moved before it runs."""
        store = self.store
        if store is not None and step.spills:
            new = [spill for spill in step.spills if store.wants(spill[1])]
            for (_, digest), held in zip(new, self.cache.read([b for b, _ in new]), strict=True):
                store.put(digest, held)
        if step.copies:
            self.cache.copy(step.copies)
        if step.restores:
            contents, targets = zip(*step.restores, strict=True)
            self.cache.write(targets, contents)

    def choose_later(self, logits: Tensor, draws: Sequence[Draw]) -> Chosen:
        """The same, to be read when it is needed; on a GPU nothing waits before."""
        if self.decoder.card is None:
            return known(sample(logits, draws))
        from infopt.core.runtime.card_sampler import sample_later

        return sample_later(self.decoder.card, logits, draws)

    def choose(self, logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
        """A token for each row of logits [R, vocabulary]."""
        if self.decoder.card is None:
            return sample(logits, draws)
        # Here, so that a CPU need not have Triton.
        from infopt.core.runtime.card_sampler import sample_on_card

        return sample_on_card(self.decoder.card, logits, draws)

    @torch.inference_mode()
    def save(self, named: Sequence[tuple[int, bytes]]) -> None:
        """Put on disk what host memory and these blocks hold, if there is a disk."""
        if self.store is None or self.store.below is None:
            return
        self.store.sink()
        new = [(block, name) for block, name in named if name not in self.store.below]
        for start in range(0, len(new), _SAVED_AT_ONCE):
            some = new[start : start + _SAVED_AT_ONCE]
            contents = self.cache.read([block for block, _ in some])
            for (_, name), content in zip(some, contents, strict=True):
                self.store.below.put(name, content)

    @torch.inference_mode()
    def run(self, inputs: StepInputs, rows: Tensor | None = None) -> Tensor:
        """Logits [R, vocabulary] of the step's tokens at `rows` [R]; of all where it is None.

        Those of a replayed step are float32, and good until the next step.
        """
        return self.compute(inputs, rows)[1]

    @torch.inference_mode()
    def compute(
        self, inputs: StepInputs, rows: Tensor | None, reads_hidden: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """Hidden states, as `forward`, and logits, as `run`; a replayed step has no hidden states,
        and none is replayed whose hidden states are read."""
        if not reads_hidden:
            logits = self.replays.logits(inputs, rows)
            if logits is not None:
                return None, logits
        hidden = self.forward(inputs)
        return hidden, self.logits(hidden, rows)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> Tensor:
        """Hidden states [T, hidden] of the step's tokens, before the last norm."""
        return self.decoder(inputs, self.cache.layers)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [R, vocabulary] of the hidden states at `rows` [R]; of all where it is None."""
        return self.decoder.logits(hidden if rows is None else hidden.index_select(0, rows))

    @torch.inference_mode()
    def states(self, hidden: Tensor) -> Tensor:
        """What the head reads of hidden states [R, hidden]."""
        return self.decoder.states(hidden)

    @torch.inference_mode()
    def first_fault(self, inputs: StepInputs, row: int) -> str:
        """The first layer whose output for a row of the step just run is not finite."""
        return self.decoder.first_fault(inputs, self.cache.layers, row)
