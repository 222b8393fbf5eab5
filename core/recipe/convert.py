"""Settings of `infopt convert`."""

from typing import Literal, Self

from pydantic import model_validator

from infopt.core.recipe.base import Settings
from infopt.core.recipe.schemes import Format
from infopt.core.recipe.text import DType


class ConvertSettings(Settings):
    """Into which checkpoint format a quantized model is re-packed."""

    format: Format | Literal["dense"]
    """`dense` dequantizes; all others hold the same values exactly, or are refused."""
    dense_dtype: DType = "auto"
    """Of dense weights; auto is what the model computes in, and only float32 is always exact."""

    @model_validator(mode="after")
    def _dtype_is_read(self) -> Self:
        if self.dense_dtype != "auto" and self.format != "dense":
            raise ValueError("a dtype is read by format dense only: codes and scales keep theirs")
        return self
