"""One decoder for every architecture of `families`: a forward pass over a ragged batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infopt.core.layers.attention import Attending, Attention, AttentionInputs
from infopt.core.layers.embedding import Embedding, Table
from infopt.core.layers.linear import Projection
from infopt.core.layers.norm import Norm
from infopt.core.layers.rotary import Rotary
from infopt.core.models.config import ModelConfig
from infopt.core.models.mlp import FeedForward
from infopt.kernels.attention.paged import AttentionPlan
from infopt.kernels.gpu.tile import Card


class Tokens(Protocol):
    """What is embedded."""

    @property
    def token_ids(self) -> Tensor:
        """int64 [T]"""
        ...

    @property
    def positions(self) -> Tensor:
        """int64 [T]"""
        ...


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of one step, those of all requests behind one another."""

    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]: where in the cache their keys and values go."""
    plan: AttentionPlan


Add = Callable[[Tensor, Tensor], Tensor]
"""Adds the second to the first, in place, and returns it."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then an MLP, each added to what comes in.

    A norm comes before each of the two; or, `norms_after`, after each sum. Where there are out
    norms, they are of what is added.
    """

    input_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: FeedForward
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    norms_after: bool = False
    add: Add = Tensor.add_

    def __call__(self, x: Tensor, inputs: Attending, cache: Tensor) -> Tensor:
        """x [T, hidden], which may be added to in place."""
        return self.feed(self.attend(x, inputs, cache))

    def attend(self, x: Tensor, inputs: Attending, cache: Tensor) -> Tensor:
        """The first half."""

        def attention(hidden: Tensor) -> Tensor:
            return self.attention(hidden, inputs, cache)

        return self._add(x, self.input_norm, attention, self.attention_out_norm)

    def feed(self, x: Tensor) -> Tensor:
        """The second half."""
        return self._add(x, self.mlp_norm, self.mlp, self.mlp_out_norm)

    def _add(
        self, x: Tensor, norm: Norm, part: Callable[[Tensor], Tensor], out_norm: Norm | None
    ) -> Tensor:
        found = part(x if self.norms_after else norm(x))
        x = self.add(x, found if out_norm is None else out_norm(found))
        return norm(x) if self.norms_after else x

    @property
    def nbytes(self) -> int:
        return self._norm_bytes + self.attention.nbytes + self.mlp.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return self._norm_bytes + self.attention.nbytes + self.mlp.token_bytes

    @property
    def _norm_bytes(self) -> int:
        norms = (self.input_norm, self.mlp_norm, self.attention_out_norm, self.mlp_out_norm)
        return sum(norm.nbytes for norm in norms if norm is not None)


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Of one kind of layer: frequencies float32 [dim / 2], and what sines are multiplied by."""

    frequencies: Tensor
    magnitude: float


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in place."""
    return logits.div_(cap).tanh_().mul_(cap)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Weights and the forward pass; the cache belongs to the caller."""

    config: ModelConfig
    embedding: Table
    layers: tuple[DecoderLayer, ...]
    norm: Norm | None
    head: Projection
    rotaries: tuple[RotaryTable, ...]
    positions: Embedding | None = None
    """Learned ones."""
    project_in: Projection | None = None
    """Of embeddings that are not as wide as the layers."""
    project_out: Projection | None = None
    add: Add = Tensor.add_
    cap: Callable[[Tensor, float], Tensor] = capped
    card: Card | None = None
    """The GPU whose kernels do attention; torch does it where there is none."""

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that a decode step of one token reads.

        That is all but tables of which a row is read, and experts that it is not routed to.
        """
        return sum(layer.token_bytes for layer in self.layers) + self._outer_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights in memory, a tied table once."""
        tied = self.embedding.held_by(self.head)
        tables = (None if tied else self.embedding, self.positions)
        rows = sum(table.nbytes for table in tables if table is not None)
        return sum(layer.nbytes for layer in self.layers) + self._outer_bytes + rows

    @property
    def _outer_bytes(self) -> int:
        parts = (self.norm, self.head, self.project_in, self.project_out)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, inputs: StepInputs, caches: Sequence[Tensor]) -> Tensor:
        """Fill the caches, one a layer; return hidden states [T, hidden] before the last norm."""
        return self.through(self.embed(inputs), self.attention_inputs(inputs), caches)

    def through(self, x: Tensor, attention: Attending, caches: Sequence[Tensor]) -> Tensor:
        """x [T, hidden] through all layers."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, attention, cache)
        return x

    def attention_inputs(self, inputs: StepInputs) -> Attending:
        """What is the same for every layer of a step."""
        rotaries = self.angles(inputs.positions)
        if self.card is None:
            return AttentionInputs(rotaries, inputs.slots, inputs.plan)
        # Here, so that a CPU need not have Triton.
        from infopt.core.layers.card_attention import CardInputs, StepPlan

        plan = StepPlan(self.card, inputs.plan, self.device)
        return CardInputs(self.card, rotaries, inputs.slots, plan)

    def angles(self, positions: Tensor) -> tuple[Rotary, ...]:
        """Of each kind of layer, for positions [T]."""
        return tuple(
            Rotary.at(positions, table.frequencies, self.dtype, table.magnitude)
            for table in self.rotaries
        )

    def embed(self, inputs: Tokens) -> Tensor:
        """What enters the first layer, [T, hidden]."""
        x = self.embedding(inputs.token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = self.add(x, self.positions(inputs.positions))
        return x

    def states(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, embedding size]: what the head reads, after the last norm."""
        x = hidden if self.norm is None else self.norm(hidden)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocabulary], for the rows that need them only."""
        x = self.states(hidden)
        found, cap = self.head(x), self.config.logit_cap
        return found if cap is None else self.cap(found, cap)

    def first_fault(self, inputs: StepInputs, caches: Sequence[Tensor], row: int) -> str:
        """Where a step's row first is not finite: the step is computed again, part by part.

        To be called before the caches are written again: the same keys and values are written.
        """
        names, attention = self.config.names, self.attention_inputs(inputs)

        def fine(x: Tensor) -> bool:
            return bool(torch.isfinite(x[row]).all())

        x = self.embed(inputs)
        if not fine(x):
            return names.embedding
        for n, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            owner = f"{names.layer}.{n}"
            x = layer.attend(x, attention, cache)
            if not fine(x):
                return f"{owner}.{names.output.rpartition('.')[0]}"
            x = layer.feed(x)
            if not fine(x):
                return f"{owner}.{names.down.rpartition('.')[0] or names.down}"
        return names.norm if self.norm is not None and not fine(self.norm(x)) else names.head
