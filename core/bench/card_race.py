"""Race an op of a GPU's kernels with torch's ways to the same result.

Inputs take turns, so many copies of them that the cache holds none when its turn comes again; a
pass over all copies is one CUDA graph, timed by the timer that all measurements share. Kernels and
torch's ways alternate, pass by pass.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from infopt.core.bench.card_made import Made, standing
from infopt.core.profiling.captured import captured
from infopt.core.profiling.timer import timed
from infopt.core.progress import ProgressCallback
from infopt.kernels.gpu.tile import Card

_PASSES = 9
_MOST_COPIES = 64
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class Rig:
    """The GPU that ops are raced on, what it reaches, and what is noted on the way."""

    card: Card
    device: torch.device
    cache_bytes: int
    read: float
    """Bytes a second."""
    flops: Mapping[str, float]
    """A second, by what is multiplied."""
    progress: ProgressCallback
    timer: Timer = timed
    left_out: list[str] = field(default_factory=list)
    """Ways of torch that could not be raced."""
    failed: list[str] = field(default_factory=list)
    """Ops of ours that could not be run."""

    def race(
        self, name: str, make: Callable[[], Made], tolerance: float, kind: str | None = None
    ) -> dict[str, Any] | None:
        """The figures of a row, those of `kind`'s products where one is told; None where ours
        fails: what was measured before is not to be lost."""
        if self.device.type == "cuda":
            torch.compiler.reset()  # each shape is compiled for itself
        try:
            copies = _copies(make, self.cache_bytes)
            error = copies[0].error()
            works, left_out = _works(copies, tolerance)
            times = _times(works, len(copies), self.device, self.timer)
        except Exception as failure:
            said = (str(failure).splitlines() or [""])[0]
            self.failed.append(f"{name}: {type(failure).__name__}: {said[:300]}")
            return None
        self.left_out.extend(f"{name}: {way} is left out: {why}" for way, why in left_out.items())
        found = self._figures(copies[0], times)
        found |= {"error": error, "tolerance": tolerance, "right": error <= tolerance}
        if kind is not None:
            rate = copies[0].flops / found["seconds"]
            found |= {"flops_per_s": rate, "of_product": rate / self.flops[kind]}
        return found

    def _figures(self, made: Made, times: Mapping[str, float]) -> dict[str, Any]:
        seconds = times[""]
        others = {name: taken for name, taken in times.items() if name}
        best = min(others, key=lambda name: others[name]) if others else None
        rate = made.nbytes / seconds
        return {
            "seconds": seconds,
            "torch_seconds": None if best is None else others[best],
            "torch_kernel": best or "none",
            "ratio": None if best is None else others[best] / seconds,
            "bytes": made.nbytes,
            "bytes_per_s": rate,
            "of_bandwidth": rate / self.read,
        }


def _copies(make: Callable[[], Made], cache_bytes: int) -> list[Made]:
    """As many as take twice the cache."""
    first = make()
    count = max(1, min(_MOST_COPIES, -(-2 * cache_bytes // first.nbytes)))
    return [first, *(make() for _ in range(count - 1))]


def _works(
    copies: Sequence[Made], tolerance: float
) -> tuple[dict[str, list[Callable[[], object]]], Mapping[str, str]]:
    """Ours under the empty name, and torch's that stand."""
    found = standing(copies[0], tolerance)
    works = {"": [made.ours for made in copies]}
    works |= {name: [made.torchs[name] for made in copies] for name in found.works}
    return works, found.left_out


def _times(
    works: Mapping[str, Sequence[Callable[[], object]]],
    copies: int,
    device: torch.device,
    timer: Timer,
) -> dict[str, float]:
    """Median seconds of a call of each."""
    passes = {name: captured(each, device) for name, each in works.items()}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(_PASSES):
        for name, work in passes.items():
            times[name].append(timer(work) / copies)
    return {name: statistics.median(found[1:]) for name, found in times.items()}
