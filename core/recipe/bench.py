"""Settings of `infopt bench`."""

from pydantic import Field

from infopt.core.recipe.serve import EngineSettings


class BenchSettings(EngineSettings):
    """The load: closed loop at a concurrency, synthetic lengths."""

    url: str | None = None
    """An OpenAI-compatible server (its base URL); default: the engine, in this process."""
    requests: int = Field(default=16, ge=1)
    concurrency: int = Field(default=4, ge=1)
    prompt_tokens: int = Field(default=128, ge=1)
    output_tokens: int = Field(default=32, ge=1)
    warmup: int = Field(default=1, ge=0)
    """Requests sent first and not counted."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds after which one request counts as failed."""
