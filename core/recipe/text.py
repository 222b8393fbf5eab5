"""Which text to use."""

from typing import Literal

from pydantic import Field

from infopt.core.recipe.base import Settings


class CalibrationSettings(Settings):
    """The text that a compression method sees: `samples` windows of `sequence_length` tokens."""

    text: str = "default"
    """`default`, `shakespeare`, a .txt or .jsonl file, or `hub:NAME[/CONFIG]:SPLIT:COLUMN`."""
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=512, ge=8)
    chat: bool = False
    """Render each text as a user's message through the model's chat template."""


class TextSettings(Settings):
    """The text to evaluate on."""

    text: str = "default"
    chat: bool = False


DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
