"""Products and layers are timed as an engine computes them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.hardware.kernel_times import KernelTimes, ProductTime
from infopt.core.layers.choice import NativeChoice
from infopt.core.layers.linear import Linear, Projection
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.profiling import drift as drifting
from infopt.core.profiling import free_layers, kernels
from infopt.core.profiling.free_layers import layer_times
from infopt.core.profiling.kernels import (
    FORMATS,
    build,
    product_time,
    product_times,
    several,
)
from infopt.core.progress import silent
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.step_times import engine_steps
from infopt.kernels.cpu.native import Native, NativeError, load
from infopt.kernels.cpu.program import Program

CPU = torch.device("cpu")


@pytest.fixture
def native() -> Native:
    try:
        return load()
    except NativeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("form", FORMATS)
def test_native_products_are_calls_of_one_program(
    native: Native, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight once a run, and the time of a run is shared out among them."""
    choice = NativeChoice(native, torch.float32, None)
    weights = [build(form, 64, 128, CPU, torch.float32, choice) for _ in range(3)]
    programs: list[Program] = []
    run = Program.run

    def counted(program: Program) -> None:
        programs.append(program)
        run(program)

    monkeypatch.setattr(Program, "run", counted)
    seconds = product_time(weights, torch.randn(5, 128), native)
    (program,) = set(programs)
    labels = [label for (label, _), _ in zip(program._labels, program._calls, strict=True)]
    assert len(labels) >= 4 and seconds > 0, "a norm, and a call or two for each product"


def test_a_product_that_has_no_native_op_is_called_by_itself(native: Native) -> None:
    calls: list[int] = []

    class Plain:
        nbytes = 0

        def __call__(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x

    plain: list[Projection] = [Plain(), Plain()]
    assert product_time(plain, torch.randn(2, 4), native) > 0
    assert len(calls) >= 9 and set(calls) == {2}


def test_products_over_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WEIGHTS", ((64, 32), (32, 64)))
    monkeypatch.setattr(kernels, "_ROWS", (1, 4))
    found = list(
        product_times(CPU, torch.float32, cache_bytes=3000, formats=("dense",), progress=silent)
    )
    assert [(one.m, one.n, one.k) for one in found] == [
        (1, 64, 32), (4, 64, 32), (1, 32, 64), (4, 32, 64),
    ]  # fmt: skip
    assert all(0 < one.seconds < 1 for one in found)


def test_more_weights_than_the_cache_holds(native: Native) -> None:
    """Each with memory of its own, and the library shared."""
    choice = NativeChoice(native, torch.float32, None)
    for form in FORMATS:
        found = several(form, 64, 128, CPU, torch.float32, cache_bytes=10_000, choice=choice)
        assert len(found) == math.ceil(80_000 / found[0].nbytes)
        addresses = {
            value.data_ptr()
            for each in found
            for part in (each, getattr(each, "weight", None))
            for value in (getattr(part, name, None) for name in ("panels", "codes", "weight"))
            if isinstance(value, Tensor)
        }
        assert len(addresses) == len(found), form
        assert len({id(getattr(each, "native", None)) for each in found}) == 1


@pytest.mark.parametrize("word", ["torch", "auto"])
def test_layers_without_their_products(monkeypatch: pytest.MonkeyPatch, word: Any) -> None:
    """Both ways an engine may compute them; what comes out is finite, so nothing was skipped."""
    sizes = free_layers._Sizes(64, 96, 4, 2, 16)
    monkeypatch.setattr(free_layers, "_SIZES", (sizes,))
    monkeypatch.setattr(free_layers, "_DECODES", ((2, 1, 20),))
    monkeypatch.setattr(free_layers, "_PREFILLS", ((1, 12, 12),))
    seen: list[Tensor] = []
    inner = engine_steps(EngineSettings(kernels=word), CPU)

    def steps(decoder: Decoder, caches: Sequence[Tensor]) -> Callable[[StepInputs], object]:
        step = inner(decoder, caches)

        def kept(inputs: StepInputs) -> object:
            found = step(inputs)
            assert isinstance(found, Tensor)
            seen.append(found.clone())
            return found

        return kept

    found = list(layer_times(CPU, torch.float32, steps, cache_bytes=1024, progress=silent))
    assert [(one.batch, one.new, one.context) for one in found] == [(2, 1, 20), (1, 12, 12)]
    assert all(0 < one.seconds < 1 for one in found)
    assert {len(logits) for logits in seen} == {2, 12}
    assert all(torch.isfinite(logits).all() for logits in seen)


def test_a_device_that_does_what_it_did_has_not_drifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the very kernels that were timed then: they take half the time now."""
    reading, computing = (1, 96, 64), (8, 64, 64)
    monkeypatch.setattr(drifting, "_READING", reading)
    monkeypatch.setattr(drifting, "_COMPUTING", computing)
    timed: list[tuple[list[Projection], Any]] = []

    def product_time(weights: list[Projection], x: Tensor, native: Native | None) -> float:
        timed.append((weights, native))
        return 0.5e-3

    monkeypatch.setattr(drifting, "product_time", product_time)
    monkeypatch.setattr(drifting, "cache_bytes", lambda _: 1)
    record = KernelTimes(
        device="x",
        dtype="float32",
        threads=1,
        measured_at="then",
        products=tuple(
            ProductTime(format="dense", m=m, n=n, k=k, seconds=1e-3)
            for m, n, k in (reading, computing)
        ),
        layers=(),
    )
    found = drifting.drift(record, CPU)
    assert found is not None and math.isclose(found.reading, 2) and math.isclose(found.computing, 2)
    assert all(native is not None or isinstance(held[0], Linear) for held, native in timed)
    assert drifting.drift(record.model_copy(update={"products": ()}), CPU) is None
