"""Settings of `infopt evaluate`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from infopt.core.recipe.base import Seed, Settings
from infopt.core.recipe.text import Device, DType


def _fraction(value: Any) -> Any:
    """`2%` and `0.02` are the same share."""
    if isinstance(value, str):
        word = value.strip()
        try:
            return float(word[:-1]) / 100 if word.endswith("%") else float(word)
        except ValueError:
            raise ValueError("a share is a number or a percentage, such as 2%") from None
    return value


Share = Annotated[float, BeforeValidator(_fraction), Field(ge=0)]


class EvaluateSettings(Settings):
    """What to measure the quality on, and the bounds it must keep."""

    text: str = "default"
    chat: bool = False
    context: int = Field(default=1024, ge=2)
    """Tokens per window."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between the starts of windows; default: `context`, so that windows do not overlap."""
    tokens: int | None = Field(default=16384, ge=2)
    """Use at most this many tokens of the text; null for all of it."""
    baseline: str | None = None
    max_ppl_increase: Share | None = None
    """Fail if perplexity exceeds the baseline's by more than this share."""
    device: Device = "auto"
    dtype: DType = "auto"
    seed: Seed = 0
