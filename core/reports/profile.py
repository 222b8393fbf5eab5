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


class Prediction(Record):
    """Times from a device's speed: of its kernels as measured, or of its peaks and a share."""

    ttft_s: float
    """Of the batch's prompts in one pass, nothing waiting before them."""
    tpot_s: float
    """A decode step at the full context."""
    output_tokens_per_s: float
    prefill_bound: str
    """'compute' or 'memory': which takes the longer by the peaks."""
    decode_bound: str
    compute_share: float | None
    """Of the peak FLOP/s, assumed; None where kernels were measured."""
    bandwidth_share: float | None
    critical_batch: float | None
    """Above it a decode step at this context is bound by compute; None: at no batch."""
    critical_context: float
    """From it on no batch makes decode bound by compute: reading a token's cache takes the longer.
    """
    source: str
    """'kernels' of this device, or 'roofline'."""
    missing: tuple[str, ...] = ()
    """Number formats without measured kernels, for which the roofline stands in."""


class StaticProfile(Record):
    dtype: str
    """Of plain weights, activations and the cache; quantized layers count as they are stored."""
    parameters: int
    parameters_without_embedding: int
    active_parameters: int
    """Of experts, those that a token is routed to."""
    weight_bytes: int
    kv_bytes_per_token: int
    batch: int
    prompt_tokens: int
    context: int
    kv_bytes: int
    """For `batch` sequences of `context` tokens."""
    memory: MemoryNeed
    memory_bytes: int
    """Weights, cache, activations, logits and reserve together."""
    device_memory_bytes: int
    fits: bool
    largest_batch: int
    """Of sequences of `context` tokens that fit; 0 if none does."""
    longest_context: int
    """Of `batch` sequences that fit, at most the model's positions."""
    prefill: PhaseCost
    decode: PhaseCost
    predicted: Prediction | None = None
    """None where nothing is known of the device's speed."""


class MeasuredOperator(Record):
    """One kind of operator as the runtime ran it, over all layers."""

    name: str
    """'between operators' is what the step took beside them."""
    seconds: float
    share: float
    """Of the step, timed with a clock at each operator."""
    flops: float
    bytes: float
    mfu: float | None
    """Never clamped."""
    mbu: float | None


class MeasuredPhase(Record):
    """A phase as the runtime ran it."""

    seconds: float
    """Median time of one prefill, or of one decode step."""
    seconds_min: float
    roofline_seconds: float
    """The bound: bytes or FLOPs over their peak rate, the longer."""
    predicted_seconds: float | None = None
    """From this device's measured kernels; None where they were not measured (--calibrate)."""
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
    operators: tuple[MeasuredOperator, ...] = ()
    """The longest first."""
    layer_seconds: tuple[float, ...] = ()
    """Of each layer, with a clock at each operator."""
    joules: float | None = None
    """Of one prefill or step, idle power taken off; None where it was not counted."""
    joules_per_token: float | None = None


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


class KvCache(Record):
    """The cache of `batch` sequences of `context` tokens."""

    bytes: int
    bytes_per_token: int
    """Of a sequence that no window bounds."""
    batch: int
    context: int
    dtype: str
    kind: str
    """Such as 'grouped queries, 3 of 9 heads'."""
    share_of_weights: float


class MemoryTimeline(Record):
    """Memory of this process while the phases ran."""

    peak_bytes: int
    before_bytes: int
    """When the runs began, the weights loaded."""
    expected_bytes: int
    samples: tuple[tuple[float, int], ...]
    """(seconds, bytes), of each stretch the highest."""
    largest_batch: int
    """That would fit with the measured rather than the expected reserve."""


class CalibrationTable(Record):
    """What `--calibrate` measured."""

    file: str
    products: int
    layers: int
    steps: int
    seconds: float
    conditions: dict[str, str]


class Drift(Record):
    """This device's speed now over that when its kernels were calibrated."""

    reading: float
    computing: float
    calibrated_at: str


class ProfileReport(Report):
    command: str = "profile"
    static: StaticProfile
    kv_cache: KvCache
    device: str
    """The one that the static part speaks of."""
    prefill: MeasuredPhase | None = None
    decode: MeasuredPhase | None = None
    peaks: Peaks | None = None
    memory: MemoryTimeline | None = None
    trace: str | None = None
    """The file of the trace."""
    calibration: CalibrationTable | None = None
    drift: Drift | None = None
    """Where phases were measured beside their prediction."""
    only: str | None = None
    """'kv' where nothing but the cache was asked for."""
