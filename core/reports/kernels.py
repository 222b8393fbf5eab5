"""The report of `infopt bench kernels`."""

from infopt.core.reports.schema import Record, Report


class Raced(Record):
    """An op, timed in turns with torch's ways to the same result, over inputs that no cache
    holds."""

    seconds: float
    """Median of our kernel's calls."""
    torch_seconds: float | None
    """Median of the best of torch's ways; None where torch has none here."""
    torch_kernel: str
    ratio: float | None
    """How many times as fast as torch."""
    bytes: int
    """That must be read and written."""
    bytes_per_s: float
    of_bandwidth: float
    """Share of the read bandwidth."""
    error: float
    """Largest difference from the reference, as a share of its largest value."""
    tolerance: float
    right: bool


class KernelRow(Raced):
    """One product x [m, k] by a weight [n, k]."""

    format: str
    """Of weight and inputs, such as 'bfloat16' or 'W4A16 g64'."""
    dtype: str
    """Of inputs and results."""
    m: int
    n: int
    k: int
    flops_per_s: float
    of_product: float
    """Share of the best matrix product of torch in the dtype that is multiplied in."""


class RowOpRow(Raced):
    """Something done to each of `rows` rows of `columns` numbers, on a GPU."""

    op: str
    rows: int
    columns: int


class AttentionRow(Raced):
    """Attention of several requests over a paged cache, on a GPU."""

    op: str
    requests: int
    queries: int
    """Of all of them."""
    context: int
    """Tokens in the cache, of the longest."""
    heads: int
    kv_heads: int
    head_dim: int
    cache: str
    """The dtype of keys and values."""
    bound: str
    """'reading' or 'product': of which limit its share is what counts."""
    flops_per_s: float
    of_product: float


class KernelsReport(Report):
    command: str = "kernels"
    isa: str
    """The set of instructions that native kernels used."""
    threads: int
    read_bytes_per_s: float
    """The best reading of memory, between the products' timings."""
    product_flops_per_s: dict[str, float]
    """Of torch's best matrix product, by the dtype that is multiplied in."""
    rows: tuple[KernelRow, ...]
    ops: tuple[RowOpRow, ...] = ()
    """On a GPU."""
    attention: tuple[AttentionRow, ...] = ()
    """The same."""
    failed: tuple[str, ...] = ()
    """What could not be run, with the reason."""
