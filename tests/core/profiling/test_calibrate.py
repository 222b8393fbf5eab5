"""A short measurement of this machine: every kernel is there, the ceiling is the highest."""

import pytest
import torch

from infopt.core.profiling.calibrate import Ceilings, Rate, measure_ceilings
from infopt.core.progress import Progress


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ceilings_of_this_machine(dtype: torch.dtype) -> None:
    seen: list[Progress] = []
    state = torch.get_rng_state()
    found = measure_ceilings(
        torch.device("cpu"), dtype, cache_bytes=1, seconds=0.05, progress=seen.append
    )
    names = {rate.kernel for rate in found.bandwidth}
    assert {"copy", "triad", "sum", "dot", "gemv", "linears of one token"} <= names
    assert found.buffer_bytes == 64 * 2**20
    assert torch.equal(torch.get_rng_state(), state)
    for rate in (*found.bandwidth, *found.compute):
        assert 0 < rate.median <= rate.best
    # No machine reads less than 100 MB/s or more than 100 TB/s.
    assert 1e8 < found.reader.best < 1e14
    assert 1e8 < found.product.best < 1e17
    assert {progress.stage for progress in seen} == {"measure bandwidth", "measure compute"}


def test_the_ceiling_is_the_highest() -> None:
    rates = (Rate("copy", 3.0, 1.0), Rate("gemv", 5.0, 0.5))
    found = Ceilings(bandwidth=rates, compute=rates[:1], buffer_bytes=1)
    assert found.reader.kernel == "gemv"
    assert found.product.best == 3.0
