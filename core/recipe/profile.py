"""Settings of `infopt profile`."""

from pydantic import Field

from infopt.core.recipe.base import Seed, Settings
from infopt.core.recipe.text import Device, DType


class ProfileSettings(Settings):
    """What to count and what to measure."""

    mfu: bool = False
    """Measure prefill and print model FLOP/s utilization."""
    mbu: bool = False
    """Measure decode and print model bandwidth utilization."""
    batch: int = Field(default=1, ge=1)
    prompt_tokens: int = Field(default=512, ge=1)
    output_tokens: int = Field(default=32, ge=2)
    """Decode steps measured, after the prompt."""
    repeats: int = Field(default=5, ge=1)
    device: Device = "auto"
    dtype: DType = "auto"
    seed: Seed = 0
