"""What becomes of a query's products with the keys, on whatever device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scores:
    """Before the softmax."""

    scale: float
    window: int | None = None
    """Tokens to look back on, itself included."""
    cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
