"""The report of `infopt bench kernels`."""

from infopt.core.reports.schema import Record, Report


class KernelRow(Record):
    """One product x [m, k] by a weight [n, k] that was not in the cache."""

    format: str
    """Of weight and inputs, such as 'bfloat16' or 'W4A16 g64'."""
    dtype: str
    """Of inputs and results."""
    m: int
    n: int
    k: int
    seconds: float
    """Median of the native kernel's calls."""
    torch_seconds: float
    """Median of the best of torch's ways to the same result, called in turns with it."""
    torch_kernel: str
    ratio: float
    """How many times as fast as torch."""
    bytes: int
    """Of the weight as it is stored, the inputs and the results."""
    bytes_per_s: float
    of_bandwidth: float
    """Share of the read bandwidth."""
    flops_per_s: float
    of_product: float
    """Share of the best matrix product of torch in the dtype that is multiplied in."""
    error: float
    """Largest difference from the reference, as a share of its largest value."""
    tolerance: float
    right: bool


class RowOpRow(Record):
    """Something done to each of `rows` rows of `columns` numbers, on a GPU."""

    op: str
    rows: int
    columns: int
    seconds: float
    torch_seconds: float
    torch_kernel: str
    ratio: float
    bytes: int
    bytes_per_s: float
    of_bandwidth: float
    error: float
    tolerance: float
    right: bool


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
