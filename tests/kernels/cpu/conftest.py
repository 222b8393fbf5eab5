"""Native kernels with each set of instructions that this CPU has."""

import pytest

from infopt.kernels.cpu.native import ISAS, Native, NativeError, load, usable_isas


@pytest.fixture(scope="module", params=ISAS)
def native(request: pytest.FixtureRequest) -> Native:
    try:
        usable = usable_isas()
    except NativeError as error:
        pytest.skip(str(error))
    if request.param not in usable:
        pytest.skip(f"this CPU has no {request.param}")
    return load(request.param)
