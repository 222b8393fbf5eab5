"""The report of `infopt profile`."""

from infopt.core.reports.schema import Record, Report


class OperatorCost(Record):
    """One kind of operator, over the whole model, for one phase."""

    name: str
    flops: float
    weight_bytes: float
    activation_bytes: float
    """Bytes of KV cache read or written."""


class PhaseCost(Record):
    """What a phase needs, from the config alone."""

    tokens: int
    flops: float
    bytes: float
    operators: tuple[OperatorCost, ...]


class MemoryNeed(Record):
    """Bytes while serving, by what holds them."""

    weights: int
    kv_cache: int
    activations: int
    logits: int
    reserve: int
    """For the interpreter, the libraries and the allocator; assumed."""
    total: int


class StaticProfile(Record):
    dtype: str
    """Of plain weights, activations and the cache; quantized layers count as they are stored."""
    parameters: int
    parameters_without_embedding: int
    weight_bytes: int
    kv_bytes_per_token: int
    batch: int
    context: int
    kv_bytes: int
    """For `batch` sequences of `context` tokens."""
    memory: MemoryNeed
    memory_bytes: int
    """Weights, cache, activations, logits and reserve together."""
    device_memory_bytes: int
    fits: bool
    largest_batch: int
    prefill: PhaseCost
    decode: PhaseCost


class MeasuredPhase(Record):
    """A phase as the runtime ran it."""

    seconds: float
    """Median time of one prefill, or of one decode step."""
    seconds_min: float
    predicted_seconds: float
    """The roofline's bound: bytes or FLOPs over their peak rate, the longer."""
    tokens: int
    """Tokens computed in that time."""
    flops: float
    bytes: float
    """With the weights as the runtime holds them."""
    tokens_per_s: float
    flops_per_s: float
    bytes_per_s: float
    mfu: float
    """Achieved FLOP/s over the measured peak. Never clamped: above 1 is a bug, and is warned of."""
    mbu: float
    """Achieved bytes/s over the measured peak. Never clamped."""


class Peaks(Record):
    """Measured on this device."""

    device: str
    dtype: str
    threads: int
    flops_per_s: float
    """Of the best matrix product, in this dtype."""
    bytes_per_s: float
    """Of the best reading kernel."""
    measured_at: str
    conditions: dict[str, str]
    """In words: the kernels that won, the load before, sizes, torch's version."""


class ProfileReport(Report):
    command: str = "profile"
    static: StaticProfile
    prefill: MeasuredPhase | None = None
    decode: MeasuredPhase | None = None
    peaks: Peaks | None = None
