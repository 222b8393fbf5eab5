"""How a core routine tells of its progress; the screen decides what to show."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of a stage; `total` is None where it is not known.

    `resumed` units were finished by an earlier run and say nothing about the speed of this one.
    """

    stage: str
    done: int = 0
    total: int | None = None
    note: str = ""
    resumed: int = 0


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Show nothing."""
