"""Kernels under Triton's interpreter and, where there is one, on a GPU: the same tests.

A test that asks for `device` is both `interpreted` and, with its second parameter, `gpu`.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infopt.kernels.gpu.tile import H100, Card

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "kernels/gpu: not tested, Triton is not installed"
    return None


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreted),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel's tensors lie."""
    return torch.device(request.param)


@pytest.fixture
def card(device: torch.device) -> Card:
    """The GPU at hand; under the interpreter an H100's tiles."""
    if device.type == "cpu":
        return Card.with_shipped(**H100)
    return Card.at_hand(device)


@pytest.fixture
def mutated(tmp_path: Path) -> Callable[[ModuleType, str, str], ModuleType]:
    """A copy of a module in whose source one piece of text, which is there once, is another."""

    def mutate(module: ModuleType, text: str, other: str) -> ModuleType:
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        if source.count(text) != 1:  # no AssertionError: that is what such tests wait for
            raise LookupError(f"{text!r} is there {source.count(text)} times")
        file = tmp_path / f"mutated_{abs(hash((text, other)))}.py"
        file.write_text(source.replace(text, other))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        import sys

        sys.modules[file.stem] = found  # dataclasses look their module up
        spec.loader.exec_module(found)
        return found

    return mutate


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What a launcher allocates is full of NaN, or of the largest integers, until written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
