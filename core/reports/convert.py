"""The report of `infopt convert`."""

from infopt.core.reports.schema import Report


class ConvertReport(Report):
    command: str = "convert"
    output: str
    source_format: str
    """The checkpoint format that was read."""
    format: str
    """The checkpoint format that was written, or dense."""
    dtype: str | None = None
    """Of dense weights."""
    layers: int
    """Quantized layers that were re-packed."""
    schemes: dict[str, int]
    """How many layers had each number format, in words such as 'int4 g64 sym'."""
    exact: bool
    """Whether every weight read back from disk equals what it was, to the last bit of float32."""
    largest_difference: float
    """Of a weight read back from what it was; 0 where `exact`."""
    bytes: int
    """Of the written weight files."""
    original_bytes: int
    seconds: float
    peak_memory_bytes: int
