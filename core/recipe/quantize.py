"""Settings of `infopt quantize`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from infopt.core.recipe.base import Seed, Settings, Words
from infopt.core.recipe.evaluate import Share
from infopt.core.recipe.schemes import (
    BITS_OF,
    CHOOSING,
    ROUNDING_OF,
    Format,
    Method,
    Scheme,
    check_scheme,
    default_format,
    default_scheme,
    unread_option,
)
from infopt.core.recipe.text import CalibrationSettings, Device, DType

GroupSize = Literal[32, 64, 128, "channel", "auto"]
Bits = Literal[2, 3, 4, 8]
Rounding = Literal["rtn", "gptq", "autoround"]
Offload = Literal["auto", "memory", "disk"]


def _alpha(value: Any) -> Any:
    return "search" if value == "search" else value


class QuantizeSettings(Settings):
    """How to quantize: the method, the scheme and the calibration.

    Whatever is left out follows from the method; an option that the method would not read is
    refused when it is off its default.
    """

    method: Method = "gptq"
    scheme: Scheme | None = None
    """Bits of weights and activations; follows from method and bits."""
    bits: Bits | None = None
    """Of a weight; follows from the scheme, else 4."""
    group_size: GroupSize = "auto"
    """Input columns that share a scale: 32, 64 or 128, `channel` for a whole row, or `auto`:
    the largest of 128, 64, 32 that divides every layer; a row for 8-bit weights and inputs."""
    symmetric: bool | None = None
    """A grid with its zero in the middle, or a zero of each group's own (default of awq at 4 bits
    or fewer)."""
    grid: Literal["mse", "minmax"] = "mse"
    """The range of each group: the one that rounds with the least squared error, or the whole."""
    rounding: Rounding | None = None
    """How weights are rounded after awq (default rtn), smoothquant or rotate (default gptq)."""
    act_order: bool = True
    """Quantize the columns of largest Hessian diagonal first, with static groups (gptq only)."""
    damp_percent: float = Field(default=0.01, gt=0, lt=1)
    """Share of the mean Hessian diagonal added to it (gptq only)."""
    true_sequential: bool = True
    """Within a block: q/k/v, o, gate/up, down in turn, each seeing those before it quantized."""
    gptaq: float = Field(default=0.0, ge=0, le=1)
    """Weight of the correction for inputs that are off already (GPTAQ; 0.25 is its authors')."""
    clip: bool = True
    """Search the range of each group by the error of the outputs (awq only)."""
    alpha: Annotated[float | Literal["search"], BeforeValidator(_alpha)] = "search"
    """How much of the activations' range moves into the weights, 0 to 1, or `search`: the scales
    of least error, each for itself (smoothquant only)."""
    threshold: float = Field(default=6.0, gt=0)
    """Inputs from this magnitude on stay in 16 bits (llm-int8 only)."""
    double_quant: bool = True
    """Quantize the blocks' scales as well (nf4 only)."""
    fp8: Literal["dynamic", "static", "block"] = "dynamic"
    """Scales of inputs per token, calibrated, or per 128 with weights in 128 x 128 (fp8 only)."""
    iterations: int = Field(default=200, ge=1)
    """Steps of SignSGD for each block (autoround only)."""
    steps: int = Field(default=200, ge=1)
    """Optimizer steps of 1,024 tokens (qat only)."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """At its peak: how far a weight moves at most, in steps of its grid (qat only)."""
    target_bits: float | None = Field(default=None, ge=2, le=8)
    """Give layers different bits, this many on average (scales not counted)."""
    max_ppl_increase: Share | None = None
    """Give layers as few bits as keep perplexity within this share of the original's."""
    mixed_bits: Annotated[tuple[Bits, ...], Strict(False), Field(min_length=2)] = (3, 4, 8)
    """The widths that layers of scheme mixed may have."""
    kv_cache: Literal["int8", "fp8"] | None = None
    """Calibrate scales for a quantized KV cache and store them."""
    ignore: Words = ("lm_head",)
    """Linear layers left as they are: full names, or patterns with * and ?."""
    calibrate_all_experts: bool = True
    """Show every token to every expert of an MoE; else an expert sees what is routed to it."""
    calibration: CalibrationSettings = CalibrationSettings()
    offload: Offload = "auto"
    """Where the text's hidden states are kept between two blocks; `auto` is on disk where they
    would take more than a quarter of the free memory. The result is the same."""
    format: Format | None = None
    """The checkpoint format; follows from method and scheme."""
    device: Device = "auto"
    dtype: DType = "auto"
    """The dtype of the calibration's forward passes; Hessians are float32 always."""
    seed: Seed = 0

    @field_validator("method", mode="before")
    @classmethod
    def _aliases(cls, value: object) -> object:
        return "gptq" if value in ("auto-gptq", "auto_gptq") else value

    @field_validator("alpha")
    @classmethod
    def _share(cls, value: float | str) -> float | str:
        if isinstance(value, float | int) and not 0 <= value <= 1:
            raise ValueError("alpha lies between 0 and 1, or is 'search'")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Fill what follows from the method; refuse what contradicts it or would not be read."""
        bounds = [self.target_bits, self.max_ppl_increase]
        if all(bound is not None for bound in bounds):
            raise ValueError("target_bits and max_ppl_increase are two ways to say one thing")
        mixed = any(bound is not None for bound in bounds)
        scheme = self.scheme or default_scheme(self.method, self.bits, mixed=mixed)
        check_scheme(self.method, scheme, self.bits)
        least, most = min(self.mixed_bits), max(self.mixed_bits)
        if self.target_bits is not None and not least <= self.target_bits <= most:
            raise ValueError(
                f"target_bits {self.target_bits:g} is beyond mixed_bits, {least} to {most}"
            )
        if mixed != (scheme == "mixed"):
            raise ValueError(
                "scheme mixed and a target go together: target_bits or max_ppl_increase"
            )
        found: dict[str, Any] = {"scheme": scheme, "bits": BITS_OF.get(scheme)}
        if self.rounding is None and self.method in CHOOSING and scheme != "W16A16":
            found["rounding"] = ROUNDING_OF[self.method]
        natural = not (self.method == "awq" and BITS_OF.get(scheme) in (None, 2, 3, 4))
        rounding = self.rounding or ROUNDING_OF[self.method]
        changed = self._changed({**found, "symmetric": natural})
        if problem := unread_option(self.method, rounding, scheme, changed):
            raise ValueError(problem)
        if self.symmetric is None:
            found["symmetric"] = natural
        if self.format is None:
            found["format"] = default_format(self.method, scheme, self.model_dump())
        for key, value in found.items():
            # Frozen for all others: what was left out is completed once, here.
            object.__setattr__(self, key, value)
        return self

    @property
    def how(self) -> str:
        """How weights are rounded: rtn, gptq, autoround, nf4, fp8 or qat."""
        return self.rounding or ROUNDING_OF[self.method]

    def _changed(self, following: dict[str, Any]) -> dict[str, Any]:
        """The settings that are neither their defaults nor what follows from the method."""
        fields = type(self).model_fields
        return {
            key: value
            for key in fields
            if (value := getattr(self, key)) not in (fields[key].default, following.get(key))
        }
