"""The reports of `infopt quantize`: of an artifact, and of `--analyze`."""

from typing import Literal

from infopt.core.reports.schema import Record, Report


class LayerError(Record):
    """One quantized linear layer."""

    name: str
    error: float
    """Relative output error ||(W - Q) X||^2 / ||W X||^2 on the calibration text; a method that sees
    no text has the weight's own: ||W - Q||^2 / ||W||^2."""
    rtn_error: float
    """The same for rounding the layer as it was to nearest on the same kind of grid."""
    bits: int
    group_size: int | None
    damp: float
    """Share of the mean diagonal that was added before the Cholesky factorization succeeded."""
    fallback: str | None = None
    """What the ladder fell back to, where it had to."""
    scheme: str = ""
    """The number formats in words, such as 'int4 g64 sym'."""
    seconds: float = 0.0
    """Spent on this layer; layers that are solved together share it by their sizes."""
    tokens: int = 0
    """Rows of calibration inputs that this layer saw."""


class SensitivityRow(Record):
    """What a unit costs when it alone is quantized."""

    unit: str
    """The shared name of layers that engines fuse, such as 'model.layers.0.self_attn.qkv'."""
    layers: tuple[str, ...]
    parameters: int
    bits: int
    kl: float
    """KL(original || quantized) of the next-token distributions, nats a token."""
    delta_nll: float


class Allocation(Record):
    """How `--target-bits` or `--max-ppl-increase` was met."""

    target_bits: float | None
    max_ppl_increase: float | None
    predicted_kl: float
    """The sum of the units' own KL: errors are taken to add up."""
    mean_bits: float
    """Code bits per weight over the allocated layers, without scales."""
    bits: dict[str, int]
    """By unit."""
    rounds: int = 1
    measured_ppl_increase: float | None = None
    """On held-out text, where a bound on it was given."""


class QuantizeReport(Report):
    command: str = "quantize"
    output: str
    method: str
    scheme: str
    """Such as W4A16, or mixed."""
    bits: int | None
    """Of a weight; None where layers differ or stay dense."""
    group_size: int | None
    symmetric: bool
    format: str | None
    """The checkpoint format; None is dense."""
    kv_cache: Literal["int8", "fp8"] | None = None
    bits_per_weight: float
    """As stored, over the quantized layers, with scales, zeros and indices."""
    bytes: int
    """Of the written weight files."""
    original_bytes: int
    calibration_tokens: int
    resumed_blocks: int
    seconds: float
    peak_memory_bytes: int
    logits_max_difference: float
    """Between the artifact read back from disk and the weights as they were computed."""
    allocation: Allocation | None = None
    layers: tuple[LayerError, ...]


class SensitivityReport(Report):
    """What `infopt quantize --analyze` found."""

    command: str = "quantize"
    calibration_tokens: int
    seconds: float
    allocation: Allocation | None = None
    """What the settings' target would give; nothing was quantized by it."""
    sensitivity: tuple[SensitivityRow, ...]
