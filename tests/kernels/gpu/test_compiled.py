"""The compile gate: every kernel in the tiles that ship, compiled for real targets without a GPU.

What a GPU would do with it is not told; that nothing spills, and that it fits, is.
"""

import os
import subprocess
import sys
from functools import cache

import pytest

from infopt.kernels.gpu.compiled import CARDS, Compiled, compile_examples
from infopt.kernels.gpu.examples import EXAMPLES
from infopt.kernels.gpu.tile import SMALL_SHARED

# Tiles for sm_80 are used on every card that has no more shared memory than a desktop's.
SHARED = {80: SMALL_SHARED, 90: CARDS[90]["shared_bytes"]}


@cache
def compiled(capability: int) -> dict[str, list[Compiled]]:
    found: dict[str, list[Compiled]] = {}
    for one in compile_examples(capability):
        found.setdefault(one.example, []).append(one)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_a_kernel_fits_and_does_not_spill(example, capability: int) -> None:  # type: ignore[no-untyped-def]
    if example.since > capability:
        pytest.skip("such a GPU cannot do it")
    found = compiled(capability)[example.name]
    assert found
    for one in found:
        assert one.spills == 0 and one.stack_bytes == 0, one
        assert one.shared_bytes <= SHARED[capability], one
        assert one.registers <= 255
    if capability == 90:
        told = {word for one in found for word in one.instructions}
        assert set(example.wants) <= told, found


def test_names_of_examples_are_different() -> None:
    names = [example.name for example in EXAMPLES]
    assert len(names) == len(set(names))


def test_nothing_that_a_cpu_uses_imports_triton() -> None:
    """Nor does loading a model onto a CPU: see tests/core/runtime for what an engine imports."""
    program = (
        "import sys; import infopt.core.runtime.engine, infopt.core.hardware.card; "
        "sys.exit(int('triton' in sys.modules))"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    assert subprocess.run([sys.executable, "-c", program], env=env, check=False).returncode == 0
