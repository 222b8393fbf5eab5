"""Settings of `infopt quantize`."""

from typing import Literal

from pydantic import Field, field_validator

from infopt.core.recipe.base import Seed, Settings, Words
from infopt.core.recipe.text import CalibrationSettings, Device, DType

GroupSize = Literal[32, 64, 128, "channel", "auto"]


class QuantizeSettings(Settings):
    """How to quantize: the method, the number format and the calibration."""

    method: Literal["rtn", "gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = "auto"
    """Input columns that share a scale: 32, 64 or 128, `channel` for a whole row, or `auto`:
    the largest of 128, 64, 32 that divides every layer."""
    symmetric: bool = True
    grid: Literal["mse", "minmax"] = "mse"
    """The range of each group: the one that rounds with the least squared error, or the whole."""
    act_order: bool = True
    """Quantize the columns of largest Hessian diagonal first, with static groups (gptq only)."""
    damp_percent: float = Field(default=0.01, gt=0, lt=1)
    """Share of the mean Hessian diagonal added to it (gptq only)."""
    true_sequential: bool = True
    """Within a block: q/k/v, o, gate/up, down in turn, each seeing those before it quantized."""
    ignore: Words = ("lm_head",)
    """Linear layers left as they are: full names, or patterns with * and ?."""
    calibration: CalibrationSettings = CalibrationSettings()
    format: Literal["gptq"] = "gptq"
    device: Device = "auto"
    dtype: DType = "auto"
    """The dtype of the calibration's forward passes; Hessians are float32 always."""
    seed: Seed = 0

    @field_validator("method", mode="before")
    @classmethod
    def _aliases(cls, value: object) -> object:
        return "gptq" if value in ("auto-gptq", "auto_gptq") else value
