"""Native kernels with each set of instructions that this CPU has."""

import os
from pathlib import Path

import pytest

from infopt.kernels.cpu import native as module
from infopt.kernels.cpu.native import ISAS, Native, NativeError, load, usable_isas

# A library that was built otherwise, with sanitizers.
FILE = Path(os.environ.get("INFOPT_TEST_LIBRARY", Path(module.__file__).with_name("_native.so")))


def _sets() -> tuple[str, ...]:
    """Of a library that was built to be tested, those that can be: none is to be left out."""
    return usable_isas(FILE) if "INFOPT_TEST_LIBRARY" in os.environ else ISAS


@pytest.fixture(scope="module", params=_sets())
def native(request: pytest.FixtureRequest) -> Native:
    try:
        usable = usable_isas(FILE)
    except NativeError as error:
        pytest.skip(str(error))
    if request.param not in usable:
        pytest.skip(f"this CPU has no {request.param}")
    return load(request.param, FILE)
