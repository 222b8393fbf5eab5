"""Settings of the engine and of `infopt serve`."""

from typing import Literal

from pydantic import Field

from infopt.core.recipe.base import Seed, Settings, Words
from infopt.core.recipe.text import Device, DType

KvDType = Literal["auto", "int8", "fp8"]


class EngineSettings(Settings):
    """How the engine schedules and how much memory it takes."""

    block_size: int = Field(default=16, ge=1)
    """Token slots per block of the paged KV cache."""
    kv_blocks: int | None = Field(default=None, ge=1)
    """Blocks in the pool; default: what fits in a share of the free memory."""
    kv_dtype: KvDType = "auto"
    """Of cached keys and values; auto: what the artifact says, else the dtype of the run."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens computed in one step, over all requests."""
    max_running: int = Field(default=32, ge=1)
    """Requests in one step at most."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus output; default: the model's own limit."""
    deterministic: bool = False
    """A request's tokens do not depend, by a single bit, on the others or on its chunks; slower."""
    device: Device = "auto"
    dtype: DType = "auto"
    seed: Seed = 0


class ServeSettings(EngineSettings):
    """The server around the engine."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model_name: str | None = None
    """The name that clients ask for; default: the artifact's own."""
    ask: Words = ()
    """Start, ask these as chats, stop; in a run, the server stays up for the steps that follow."""
