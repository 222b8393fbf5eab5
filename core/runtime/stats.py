"""What the engine counts."""

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

STEP_SIZES = tuple(2**power for power in range(14))
"""Bounds of the numbers of tokens by which steps are counted."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine as it stands between two steps, and its sums since it was loaded."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_free: int
    blocks_cached: int
    """Free blocks whose contents can still be found."""
    host_bytes: int
    """Held by the prefix cache's tier in host memory."""
    disk_bytes: int
    """Held by its tier on disk, whichever model they are of."""
    prefix_queries: int
    """Tokens that requests came with."""
    prefix_hits: int
    """Those of them that were not computed again."""
    preemptions: int
    steps: int
    tokens: int
    """Computed in all steps together."""
    step_tokens: int
    """Computed in the last step."""
    schedule_s: float
    build_s: float
    forward_s: float
    """On a GPU only until the work is under way: `sample_s` then has the wait for it."""
    sample_s: float
    step_sizes: tuple[int, ...]
    """How many had up to 1, up to 2, up to 4, .. tokens, each counted once; the last: more."""
    replayed: int = 0
    """Steps whose kernels ran with no Python between them."""
    not_replayed: str | None = None
    """Why none is replayed, where none can be."""


@dataclass(slots=True)
class Meter:
    """Sums over steps."""

    steps: int = 0
    tokens: int = 0
    step_tokens: int = 0
    schedule_s: float = 0.0
    build_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    step_sizes: list[int] = field(default_factory=lambda: [0] * (len(STEP_SIZES) + 1))

    def sums(self) -> dict[str, Any]:
        """By the names of `EngineStats`."""
        return {**asdict(self), "step_sizes": tuple(self.step_sizes)}

    def count(self, tokens: int, borders: tuple[float, float, float, float, float]) -> None:
        """A step of so many tokens; the times at which its four phases began, and its end."""
        began, scheduled, built, ran, ended = borders
        self.steps += 1
        self.tokens += tokens
        self.step_tokens = tokens
        self.step_sizes[bisect_left(STEP_SIZES, tokens)] += 1
        self.schedule_s += scheduled - began
        self.build_s += built - scheduled
        self.forward_s += ran - built
        self.sample_s += ended - ran
