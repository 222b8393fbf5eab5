"""Settings of `infopt profile`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from infopt.core.recipe.base import Seed, Settings
from infopt.core.recipe.serve import Kernels
from infopt.core.recipe.text import DType

COMPUTERS = ("auto", "cpu", "cuda")
KvDType = Literal["auto", "int8", "fp8"]


class ProfileSettings(Settings):
    """What to count and what to measure."""

    mfu: bool = False
    """Measure prefill and print model FLOP/s utilization."""
    mbu: bool = False
    """Measure decode and print model bandwidth utilization."""
    static: bool = False
    """Count and predict only; of MODEL no more than its config.json is needed."""
    kv: bool = False
    """Tell the size of the KV cache, and no more."""
    calibrate: bool = False
    """Measure this device: its peaks, and its kernels over a grid of shapes."""
    memory: bool = False
    """Sample the memory while the phases run."""
    energy: bool = False
    """Count the energy of each phase, where the device counts it."""
    trace: str | None = None
    """A file for a trace of a prefill and some decode steps (Chrome, Perfetto)."""
    batch: int = Field(default=1, ge=1)
    prompt_tokens: int = Field(default=512, ge=1)
    output_tokens: int = Field(default=32, ge=2)
    """Decode steps measured, after the prompt."""
    context: int | None = Field(default=None, ge=3)
    """Prompt and output together: the longest that decode attends to."""
    repeats: int = Field(default=5, ge=1)
    weight_bits: float | None = Field(default=None, gt=0, le=32)
    """What if the layers' weights took so many bits each, scales included: 4.25, say."""
    kv_dtype: KvDType = "auto"
    """What if keys and values were cached so."""
    kernels: Kernels = "auto"
    """Whose products a CPU computes, as of `serve`."""
    device: str = "auto"
    """auto, cpu or cuda; with `static` also a device by its name, such as 'H100 SXM'."""
    device_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of the named device, 10^9 bytes, where its name does not tell."""
    dtype: DType = "auto"
    seed: Seed = 0

    @property
    def measures(self) -> bool:
        """Whether the model is run."""
        return self.mfu or self.mbu or self.memory or self.energy or self.trace is not None

    @property
    def phases(self) -> tuple[bool, bool]:
        """Whether prefill and decode are timed: both, where memory or energy alone is asked for."""
        beside = (self.memory or self.energy) and not (self.mfu or self.mbu)
        return self.mfu or beside, self.mbu or beside

    @property
    def named_device(self) -> str | None:
        """A device that is not this one."""
        return None if self.device in COMPUTERS else self.device

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        """`context` stands for the prompt's length, where that is not given."""
        if self.context is None:
            return self
        said = self.model_fields_set
        if "prompt_tokens" in said and "output_tokens" in said:
            if self.prompt_tokens + self.output_tokens != self.context:
                raise ValueError(
                    f"context {self.context} is not prompt_tokens {self.prompt_tokens} and "
                    f"output_tokens {self.output_tokens} together"
                )
            return self
        prompt, output = self.prompt_tokens, self.output_tokens
        if "prompt_tokens" in said:
            output = self.context - prompt
        else:
            output = output if "output_tokens" in said else min(output, self.context - 1)
            prompt = self.context - output
        if prompt < 1 or output < 2:
            raise ValueError(f"context {self.context} leaves no room for a prompt and an output")
        # Frozen for all others; what follows from the context is filled in here, once.
        object.__setattr__(self, "prompt_tokens", prompt)
        object.__setattr__(self, "output_tokens", output)
        return self

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.static or self.kv) and (self.measures or self.calibrate):
            raise ValueError("static and kv read a config alone: leave out what measures")
        if self.named_device and not (self.static or self.kv):
            raise ValueError(
                f"device {self.device!r} is not this one (auto, cpu, cuda): it goes with static"
            )
        if self.device_memory_gb is not None and not self.named_device:
            raise ValueError("device_memory_gb goes with a device by its name")
        if self.measures and (self.weight_bits is not None or self.kv_dtype != "auto"):
            raise ValueError("weight_bits and kv_dtype suppose: they go with static or kv")
        return self
