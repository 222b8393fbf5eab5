"""Run the phases and set them against the peaks: whole, by operator, and by layer."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from infopt.core.profiling.energy import EnergyCounter
from infopt.core.profiling.static import TABLES
from infopt.core.profiling.timer import Times, repeat, timed
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.reports.profile import (
    MeasuredOperator,
    MeasuredPhase,
    Peaks,
    PhaseCost,
    StaticProfile,
)

if TYPE_CHECKING:
    from infopt.core.models.decoder import Decoder

DECODE_WARMUP = 3
PREFILL_WARMUP = 1
# Runs with a clock at every operator, beside those that are timed whole.
_CLOCKED_PREFILLS = 2
_CLOCKED_DECODES = 8
_ENERGY_SECONDS = 10.0


class PartTimes(Protocol):
    """Seconds of one step's parts."""

    @property
    def operators(self) -> dict[str, float]: ...
    @property
    def layers(self) -> tuple[float, ...]: ...


class Runner(Protocol):
    """The runtime, one phase at a time; each call returns when its work is done."""

    dtype: str
    weight_bytes: int
    """Bytes of weights that a decode step reads."""

    def prefill(self, batch: int, tokens: int) -> None:
        """Compute `batch` prompts of `tokens` tokens, up to the logits of their last."""

    def prepare_decode(self, batch: int, context: int) -> None:
        """Make ready for `batch` sequences of `context` tokens, the one to be computed included."""

    def decode_step(self) -> None:
        """One token for each sequence, at that same context."""

    def replayed_times(self) -> PartTimes | None:
        """Of the last step, where the runtime can tell without clocks in the decoder."""

    def instrument(self, wrap: "Callable[[Decoder], Decoder] | None") -> None:
        """Run what `wrap` makes of the decoder from here on; None: the decoder itself."""


@dataclass(frozen=True, slots=True)
class Run:
    """A phase as it ran, and what it needed with the weights as the runtime holds them."""

    cost: PhaseCost
    bytes: float
    times: Times
    operators: dict[str, float] = field(default_factory=dict)
    """Seconds by operator, of runs with a clock at each."""
    operator_bytes: dict[str, int] = field(default_factory=dict)
    """Of weights, as the runtime holds them."""
    layers: tuple[float, ...] = ()
    joules: float | None = None

    def against(self, peaks: Peaks, predicted: float | None = None) -> MeasuredPhase:
        seconds = self.times.median
        flops = self.cost.flops
        rate, bandwidth = flops / seconds, self.bytes / seconds
        return MeasuredPhase(
            seconds=seconds,
            seconds_min=self.times.best,
            roofline_seconds=max(flops / peaks.flops_per_s, self.bytes / peaks.bytes_per_s),
            predicted_seconds=predicted,
            tokens=self.cost.tokens,
            flops=flops,
            bytes=self.bytes,
            tokens_per_s=self.cost.tokens / seconds,
            flops_per_s=rate,
            bytes_per_s=bandwidth,
            mfu=rate / peaks.flops_per_s,
            mbu=bandwidth / peaks.bytes_per_s,
            operators=self._operators(peaks),
            layer_seconds=self.layers,
            joules=self.joules,
            joules_per_token=None if self.joules is None else self.joules / self.cost.tokens,
        )

    def _operators(self, peaks: Peaks) -> tuple[MeasuredOperator, ...]:
        costs = {cost.name: cost for cost in self.cost.operators}
        whole = sum(self.operators.values())
        found = []
        for name, seconds in self.operators.items():
            cost = costs.get(name)
            flops = cost.flops if cost else 0.0
            held = self.operator_bytes.get(name, cost.weight_bytes if cost else 0.0)
            moved = held + (cost.activation_bytes if cost else 0.0)
            timed_at_all = seconds > 0
            found.append(
                MeasuredOperator(
                    name=name,
                    seconds=seconds,
                    share=seconds / whole if whole else 0.0,
                    flops=flops,
                    bytes=moved,
                    mfu=flops / seconds / peaks.flops_per_s if timed_at_all else None,
                    mbu=moved / seconds / peaks.bytes_per_s if timed_at_all else None,
                )
            )
        return tuple(sorted(found, key=lambda one: -one.seconds))


def run_phases(
    runner: Runner,
    settings: ProfileSettings,
    static: StaticProfile,
    progress: ProgressCallback,
    energy: EnergyCounter | None = None,
) -> dict[str, Run]:
    """Prefill and decode, whichever the settings want."""
    runs: dict[str, Run] = {}
    batch = settings.batch
    with_prefill, with_decode = settings.phases
    if with_prefill:
        progress(Progress("prefill", note=f"{batch} x {settings.prompt_tokens} tokens"))

        def prefill() -> None:
            runner.prefill(batch, settings.prompt_tokens)

        times = repeat(prefill, warmup=PREFILL_WARMUP, runs=settings.repeats)
        runs["prefill"] = _run(static.prefill, runner, times, prefill, _CLOCKED_PREFILLS, energy)
    if with_decode:
        progress(Progress("decode", note=f"{batch} x 1 token at context {static.context}"))
        runner.prepare_decode(batch, static.context)
        times = repeat(runner.decode_step, warmup=DECODE_WARMUP, runs=settings.output_tokens)
        runs["decode"] = _run(
            static.decode,
            runner,
            times,
            runner.decode_step,
            _CLOCKED_DECODES,
            energy,
            again=lambda: runner.prepare_decode(batch, static.context),
        )
    return runs


def _run(
    cost: PhaseCost,
    runner: Runner,
    times: Times,
    work: Callable[[], None],
    runs: int,
    energy: EnergyCounter | None,
    again: Callable[[], None] | None = None,
) -> Run:
    """Time the operators too; what a run takes beyond them is 'between operators'."""
    from infopt.core.profiling.operators import Clock
    from infopt.core.profiling.operators import timed as with_clock

    joules = _joules(work, times.median, energy)
    clock = Clock()
    splits: list[dict[str, float]] = []
    layers: list[Sequence[float]] = []

    def keep(whole: float, split: dict[str, float], by_layer: Sequence[float]) -> None:
        splits.append({**split, "between operators": max(0.0, whole - sum(split.values()))})
        layers.append(by_layer)

    while len(splits) < runs and runner.replayed_times() is not None:
        whole = timed(work)
        if (parts := runner.replayed_times()) is not None:
            keep(whole, parts.operators, parts.layers)
    runner.instrument(lambda decoder: with_clock(decoder, clock))
    try:
        if not splits:
            if again is not None:
                again()
            work()
            for _ in range(runs):
                clock.reset()
                keep(timed(work), clock.split(), [clock.layers[n] for n in sorted(clock.layers)])
    finally:
        runner.instrument(None)
    return Run(
        cost=cost,
        bytes=cost.bytes - read_weights(cost) + runner.weight_bytes,
        times=times,
        operators={name: statistics.median(split[name] for split in splits) for name in splits[0]},
        operator_bytes=clock.bytes,
        layers=tuple(statistics.median(each) for each in zip(*layers, strict=True)),
        joules=joules,
    )


def _joules(work: Callable[[], None], seconds: float, energy: EnergyCounter | None) -> float | None:
    """Of one run, of what the device counted over ten seconds of them, its idle power taken off."""
    if energy is None:
        return None
    return energy.joules_of(work, times=max(1, round(_ENERGY_SECONDS / seconds)))


def read_weights(cost: PhaseCost) -> float:
    """Bytes of weights that every pass reads: all but the rows of the embedding tables."""
    return sum(o.weight_bytes for o in cost.operators if o.name not in TABLES)
