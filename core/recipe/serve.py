"""Settings of the engine and of `infopt serve`."""

from typing import Literal

from pydantic import Field, model_validator

from infopt.core.recipe.base import Seed, Settings, Words
from infopt.core.recipe.text import Device, DType

Batching = Literal["static", "dynamic", "continuous"]
ServeEngine = Literal["infopt", "vllm", "sglang", "llama.cpp", "transformers"]
KEYS_VARIABLE = "INFOPT_API_KEYS"
"""An environment variable with API keys, where there is no file of them."""
BATCH_WAIT_MS = 50.0
PREFIX_DISK_BYTES = 4 * 2**30
KvDType = Literal["auto", "int8", "fp8"]
Kernels = Literal["auto", "native", "torch"]
Activations = Literal["auto", "int8"]
Pooling = Literal["mean", "last"]
"""Of a prompt's hidden states into one: their mean, or the last one."""
ToolParser = Literal["auto", "hermes", "llama3-json", "mistral", "none"]


class EngineSettings(Settings):
    """How the engine schedules and how much memory it takes."""

    batching: Batching = "continuous"
    """When requests join a batch: once the one before has ended; the same, once it is full or has
    waited long enough; or at any step."""
    batch_wait_ms: float | None = Field(default=None, ge=0)
    """How long a dynamic batch waits to be full, from its first request on; default: 50."""

    block_size: int = Field(default=16, ge=1)
    """Token slots per block of the paged KV cache."""
    kv_blocks: int | None = Field(default=None, ge=1)
    """Blocks in the pool; default: what fits in a share of the free memory."""
    kv_dtype: KvDType = "auto"
    """Of cached keys and values; auto: what the artifact says, else the dtype of the run."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens computed in one step, over all requests."""
    max_chunk_tokens: int | None = Field(default=None, ge=1)
    """Of these, tokens of one prompt at most; default: all that running requests leave."""
    max_running: int = Field(default=32, ge=1)
    """Requests in one step at most."""
    watermark: float = Field(default=0.01, ge=0, lt=1)
    """Share of the blocks to leave free when a request joins others, for those to grow into."""
    prefix_caching: bool = True
    """Find the blocks of a beginning that was computed before, in place of computing it again."""
    prefix_host_bytes: int = Field(default=0, ge=0)
    """Host memory for what evicted prefix blocks held; 0: none."""
    prefix_disk: str | None = None
    """A folder of its own for what those held, and what host memory then gives up; it outlives the
    engine, and is found again by the next one of the same model."""
    prefix_disk_bytes: int | None = Field(default=None, ge=1)
    """What that folder may hold; default: 4 GiB."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus output; default: the model's own limit."""
    deterministic: bool = False
    """A request's tokens do not depend, by a single bit, on the others or on its chunks; slower."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Of a CPU's products; default: OMP_NUM_THREADS, else one for each core."""
    kernels: Kernels = "auto"
    """Whose products a CPU computes; auto: what INFOPT_KERNELS says, else for each shape the
    faster, native where that was not measured."""
    activations: Activations = "auto"
    """Of products with 4-bit weights in groups on a CPU; auto: as the artifact says, int8: rounded
    to 8 bits, group by group and row by row, an approximation that is faster."""
    repack_cache: bool = True
    """Keep weights as native kernels read them, in a file beside the artifact (where that cannot be
    written, in the user's cache): the next start reads that, and packs nothing."""
    device: Device = "auto"
    dtype: DType = "auto"
    seed: Seed = 0

    @model_validator(mode="after")
    def _is_read(self) -> "EngineSettings":
        if self.batch_wait_ms is not None and self.batching != "dynamic":
            raise ValueError("batch_wait_ms is for batching: dynamic")
        if self.prefix_host_bytes and not self.prefix_caching:
            raise ValueError("prefix_host_bytes needs prefix_caching")
        if self.prefix_disk is not None and not self.prefix_caching:
            raise ValueError("prefix_disk needs prefix_caching")
        if self.prefix_disk == "":
            raise ValueError("prefix_disk names no folder")
        if self.prefix_disk_bytes is not None and self.prefix_disk is None:
            raise ValueError("prefix_disk_bytes needs prefix_disk")
        return self

    @property
    def batch_wait_s(self) -> float:
        return (BATCH_WAIT_MS if self.batch_wait_ms is None else self.batch_wait_ms) / 1000

    @property
    def prefix_disk_limit(self) -> int:
        return PREFIX_DISK_BYTES if self.prefix_disk_bytes is None else self.prefix_disk_bytes


class ServeSettings(EngineSettings):
    """The server around the engine."""

    engine: ServeEngine = "infopt"
    """infopt's own, or another one's server, started with what these settings are there."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model_name: str | None = None
    """The name that clients ask for; default: the artifact's own."""
    api_key_file: str | None = None
    """One a line: `KEY [name=NAME] [rate=PER_MINUTE] [concurrency=N]`; without it, those of
    INFOPT_API_KEYS; without either, all may ask."""
    max_queued_requests: int = Field(default=512, ge=1)
    """Prompts that may wait for a place in the engine's steps; one more is refused (429)."""
    max_queued_tokens: int | None = Field(default=None, ge=1)
    """Tokens of theirs; default: four times what the KV cache holds."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Of a request's body; a larger one is refused (413)."""
    rate_limit: float | None = Field(default=None, gt=0)
    """Requests a minute of one client; default: any number."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Requests of one client at a time; default: any number."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds after which a request is ended (408); a client may ask for fewer."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """Seconds that requests have to end after a first signal."""
    max_idle: float | None = Field(default=None, gt=0)
    """Seconds without requests after which the engine's memory is given back, until the next
    one."""
    log_file: str | None = None
    """A line of JSON for each request goes there; - is the standard error."""
    otlp_endpoint: str | None = None
    """Of an OpenTelemetry collector (OTLP over HTTP), which is sent each request's spans."""
    tls_cert: str | None = None
    """A certificate chain in PEM: HTTPS in place of HTTP."""
    tls_key: str | None = None
    """Its private key."""
    cors_origins: Words = ()
    """Pages of these origins may ask; * is any."""
    tool_parser: ToolParser = "auto"
    """The form in which the model writes calls of tools; auto: what its chat template says."""
    pooling: Pooling = "mean"
    """Of embeddings, where a client does not say."""
    ask: Words = ()
    """Start, ask these as chats, stop; in a run, the server stays up for the steps that follow."""

    @model_validator(mode="after")
    def _agrees(self) -> "ServeSettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.ask and (self.api_key_file or self.tls_cert):
            raise ValueError("ask starts a server for itself: it goes without keys and TLS")
        return self
