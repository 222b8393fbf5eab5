"""The report of `infopt quantize`."""

from infopt.core.reports.schema import Record, Report


class LayerError(Record):
    """One quantized linear layer."""

    name: str
    error: float
    """Relative output error ||(W - Q) X||^2 / ||W X||^2 on the calibration text; method rtn sees
    no text, and then it is the weight's own: ||W - Q||^2 / ||W||^2."""
    rtn_error: float
    """The same for rounding to nearest on the same grid."""
    bits: int
    group_size: int | None
    damp: float
    """Share of the mean diagonal that was added before the Cholesky factorization succeeded."""
    fallback: str | None = None
    """What the ladder fell back to, where it had to."""


class QuantizeReport(Report):
    command: str = "quantize"
    output: str
    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    format: str
    bits_per_weight: float
    """Over the quantized layers, scales and zeros included."""
    bytes: int
    """Of the written weight files."""
    original_bytes: int
    calibration_tokens: int
    resumed_blocks: int
    seconds: float
    peak_memory_bytes: int
    logits_max_difference: float
    """Between the artifact read back from disk and the weights as they were computed."""
    layers: tuple[LayerError, ...]
