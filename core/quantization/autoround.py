"""AutoRound: learn by sign descent which way each weight of a block is rounded.

Cheng et al., 2023, https://arxiv.org/abs/2309.05516.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from infopt.core.compression.targets import Target
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError, UsageError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.quantization.grid import Grid
from infopt.core.quantization.nearest import as_quantized, group_grids, held_zeros
from infopt.core.quantization.straight_through import (
    fake_quantize,
    round_inputs_through,
    rounded_codes,
    storable_through,
    through,
)

_MOST_OFFSET = 0.5
_RANGES = (0.5, 1.5)
"""How far the ends of a group's range may move, as shares of where rounding to nearest has them."""
_COMPARISONS = 4


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """The codes of a block's layers, and what they do to its output.

    error, nearest_error: ||Y - Y_q||^2 / ||Y||^2 over all batches, as tuned and as rounded to the
    nearest codes of the first grids; iteration: the one whose weights these are.
    """

    weights: dict[str, QuantizedWeight]
    error: float
    nearest_error: float
    iteration: int


@torch.enable_grad()
def autoround_block(
    walk: Walk,
    targets: Sequence[Target],
    forms: Mapping[str, IntegerFormat],
    expected: Sequence[Tensor],
    *,
    iterations: int = 200,
    batch: int = 8,
    seed: int = 0,
    mse: bool = True,
    activations: Mapping[str, ActivationFormat] | None = None,
    input_scales: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback = silent,
) -> TunedBlock:
    """Tune the targets of the walk's loaded block towards its outputs `expected`, one a batch.

    The batches are the walk's without its probe; an iteration takes as many of them as hold at
    least `batch` windows. Sign descent with a rate that falls from 1/iterations to 0 moves each
    weight by up to half a step before it is rounded, and both ends of each group's range. The
    error over all batches is compared before, after, and three times in between, and the best is
    kept: it is never worse than rounding to nearest. The block is not changed, and none of its
    layers may be settled. `activations` and,
    for static ones, `input_scales` say how inputs of layers are rounded. Raises NumericsError
    where the block's output is not finite, UsageError where the walk has no batches.
    """
    if not len(expected) or len(expected) != len(walk.tokens) - 1:
        raise UsageError("autoround needs calibration text", "give at least one sample")
    layers = {
        target.name: _Tuned(walk.layer(target.name).weight, forms[target.name], mse=mse)
        for target in targets
    }
    power = sum(float(value.double().square().sum()) for value in expected)
    rounding = _input_rounding(activations or {}, input_scales or {})
    with ExitStack() as hooks:
        for name, round_one in rounding.items():
            hooks.enter_context(_rounded_inputs(walk.layer(name), round_one))
        tuning = _Tuning(walk, layers, expected, torch.Generator().manual_seed(seed), batch)
        error, nearest_error, iteration = tuning.run(iterations, progress)
    weights = {name: layer.quantized() for name, layer in layers.items()}
    # A block whose output is 0 throughout is not made worse by anything that keeps it so.
    share = 1 / power if power > 0 else 0.0
    return TunedBlock(weights, error * share, nearest_error * share, iteration)


class _Tuned:
    """A weight [N, K] with what is learned of it: offsets [N, K], ends of ranges [N, G]."""

    def __init__(self, weight: Tensor, form: IntegerFormat, *, mse: bool) -> None:
        self.form = form
        self.weight = weight.detach().to(torch.float32)
        self.grid = group_grids(self.weight, form, mse=mse)
        self.offset = torch.zeros_like(self.weight)
        self._held = held_zeros(self.weight)
        self.high = torch.ones_like(self.grid.scale)
        self.low = torch.ones_like(self.grid.scale)
        self._best = [part.clone() for part in self.learned]
        for part in self.learned:
            part.requires_grad_()

    @property
    def learned(self) -> list[Tensor]:
        """A symmetric range has one end."""
        return [self.offset, self.high] + ([] if self.form.symmetric else [self.low])

    def fake(self) -> Tensor:
        """The weight as it would be stored now; gradients reach what is learned."""
        scale, zero = self._ends()
        return fake_quantize(self.weight, scale, zero, self.form, self.offset)

    def descend(self, rate: float) -> None:
        """One step against the signs of the gradients, which are forgotten."""
        with torch.no_grad():
            for part in self.learned:
                if part.grad is not None:
                    part.sub_(part.grad.sign_(), alpha=rate)
                    part.grad = None
            self.offset.clamp_(-_MOST_OFFSET, _MOST_OFFSET)
            if self._held is not None:
                self.offset.masked_fill_(self._held, 0.0)
            self.high.clamp_(*_RANGES)
            self.low.clamp_(*_RANGES)

    def keep(self) -> None:
        """What is learned so far is the best."""
        for kept, part in zip(self._best, self.learned, strict=True):
            kept.copy_(part.detach())

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The best, in its codes."""
        for kept, part in zip(self._best, self.learned, strict=True):
            part.copy_(kept)
        scale, zero = self._ends()
        codes = rounded_codes(self.weight, scale, zero, self.form, self.offset)
        return as_quantized(codes, Grid(scale, zero), self.form)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of the ranges as they are now; untouched, those of the grid exactly."""
        scale, zero = self.grid.scale, self.grid.zero
        if self.form.symmetric:
            return storable_through(scale * self.high, self.form), zero
        top = float(self.form.max_code)
        below, above = zero * self.low, (top - zero) * self.high
        # A zero outside of 1..top cannot be stored: the low end moves as far as it may.
        found = storable_through(scale * (below + above) / top, self.form)
        moved = scale * below / found
        return found, through(moved, torch.round(moved.detach()).clamp(1.0, top))


class _Tuning:
    """Sign descent over the batches of a walk."""

    def __init__(
        self,
        walk: Walk,
        layers: Mapping[str, _Tuned],
        expected: Sequence[Tensor],
        generator: torch.Generator,
        windows: int,
    ) -> None:
        self.walk, self.layers, self.expected = walk, layers, expected
        self.generator, self.windows = generator, windows
        self._waiting: list[int] = []

    def run(self, iterations: int, progress: ProgressCallback) -> tuple[float, float, int]:
        """Tune, and leave the best kept: its error, the error before, the iteration of the best."""
        first = best = self._error()
        found, note = 0, ""
        every = max(1, -(-iterations // _COMPARISONS))
        for step in range(1, iterations + 1):
            progress(Progress("tuning rounding", step - 1, iterations, note))
            self._descend((1 - (step - 1) / iterations) / iterations)
            if step % every == 0 or step == iterations:
                error = self._error()
                if error < best:
                    best, found = error, step
                    note = f"{best / first:.3f} of the error of rounding to nearest"
                    for layer in self.layers.values():
                        layer.keep()
        return best, first, found

    def _descend(self, rate: float) -> None:
        weights = {f"{name}.weight": layer.fake() for name, layer in self.layers.items()}
        leaves = {
            name: weight.detach().to(self.walk.dtype).requires_grad_()
            for name, weight in weights.items()
        }
        for index in self._drawn():
            self._loss(index, leaves).backward()  # type: ignore[no-untyped-call]
        # Layers that were not called have no gradient, and are left as rounding has them.
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                weights[name].backward(leaf.grad.to(torch.float32))  # type: ignore[no-untyped-call]
        for layer in self.layers.values():
            layer.descend(rate)

    @torch.no_grad()
    def _error(self) -> float:
        """Squared error over all batches; raises NumericsError where it is not finite."""
        dtype = self.walk.dtype
        weights = {f"{name}.weight": layer.fake().to(dtype) for name, layer in self.layers.items()}
        error = sum(float(self._loss(index, weights)) for index in range(len(self.expected)))
        if not isfinite(error):
            raise NumericsError(
                f"{self.walk.names[self.walk.position]} computes values that are not finite",
                "try --dtype float32; if it is so already, the weights are broken",
            )
        return error

    def _loss(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        output = self.walk.run(index + 1, weights)
        wanted = self.expected[index].to(output.device)
        return (output.to(torch.float32) - wanted.to(torch.float32)).square().sum()

    def _drawn(self) -> list[int]:
        """Batches that come next: all come once before one comes again."""
        drawn: list[int] = []
        while sum(len(self.expected[index]) for index in drawn) < self.windows:
            if not self._waiting:
                if len(drawn) >= len(self.expected):
                    break
                order = torch.randperm(len(self.expected), generator=self.generator)
                self._waiting = order.tolist()
            drawn.append(self._waiting.pop())
        return drawn


def _input_rounding(
    activations: Mapping[str, ActivationFormat], scales: Mapping[str, Tensor]
) -> dict[str, Callable[[Tensor], Tensor]]:
    def rounder(form: ActivationFormat, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda x: round_inputs_through(x, form, scale)

    return {name: rounder(form, scales.get(name)) for name, form in activations.items()}


def _rounded_inputs(
    layer: nn.Module, round_one: Callable[[Tensor], Tensor]
) -> AbstractContextManager[Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_one(args[0]), *args[1:])

    return layer.register_forward_pre_hook(hook)
