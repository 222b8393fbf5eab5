"""Layers in their native form against torch's, and how one is chosen."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infopt.core.errors import ResourceError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.hardware.kernel_choices import KernelChoices
from infopt.core.layers import choice as module
from infopt.core.layers.choice import NativeChoice, native_choice, native_is_faster
from infopt.core.layers.embedding import Embedding
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.native import NativeEmbedding, NativeGroups, NativeInt8, NativeLinear
from infopt.core.layers.quantized import QuantizedLinear, pack
from infopt.core.layers.rounded import RoundedLinear
from infopt.kernels.cpu.native import Native, NativeError, load
from infopt.kernels.gemm.int4 import Int4Tiles, usable
from infopt.kernels.gemm.integers import IntegerRows
from infopt.kernels.gemm.scratch import Scratch

CPU = torch.device("cpu")
EMPTY = KernelChoices(device="d", dtype="float32", threads=1, versions="1")


@pytest.fixture(scope="module")
def native() -> Native:
    try:
        return load()
    except NativeError as error:
        pytest.skip(str(error))


def quantized(
    bits: int, *, dtype: torch.dtype = torch.float32, scattered: bool = False, group: int = 32
) -> QuantizedLinear:
    form = IntegerFormat(bits, symmetric=False, group_size=group)
    index = torch.arange(128, dtype=torch.int32) // group
    weight = QuantizedWeight(
        codes=torch.randint(1 << bits, (64, 128)).to(torch.uint8),
        scales=torch.rand(64, 128 // group).half(),
        zeros=torch.randint(1 << bits, (64, 128 // group)).to(torch.uint8),
        group_index=index[torch.randperm(128)] if scattered else index,
        format=form,
    )
    found = pack(
        weight, torch.randn(64).to(dtype), dtype=dtype, device=CPU, scratch=Scratch(), by_rows=True
    )
    assert found is not None and isinstance(found.weight, IntegerRows)
    return found


def alike(one: Projection, other: Projection, dtype: torch.dtype, inputs: int) -> None:
    x = torch.randn(2, 3, inputs).to(dtype)
    found, wanted = one(x), other(x)
    assert found.dtype == wanted.dtype == dtype and found.shape == wanted.shape
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found - wanted).abs().max() < near * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer(native: Native, dtype: torch.dtype, bias: bool) -> None:
    linear = Linear(torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype) if bias else None)
    found = NativeChoice(native, dtype, None).settle(linear)
    assert isinstance(found, NativeLinear)
    alike(found, linear, dtype, 64)
    assert found.nbytes == 64 * 64 * dtype.itemsize + (48 * 4 if bias else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scattered", [True, False])
def test_a_layer_of_groups(native: Native, dtype: torch.dtype, bits: int, scattered: bool) -> None:
    linear = quantized(bits, dtype=dtype, scattered=scattered)
    found = NativeChoice(native, dtype, None).settle(linear)
    assert isinstance(found, NativeGroups) and (found.columns is not None) == scattered
    alike(found, linear, dtype, 128)


def test_groups_that_are_too_small_stay(native: Native) -> None:
    linear = quantized(4, group=16)
    assert NativeChoice(native, torch.float32, None).settle(linear) is linear


@pytest.mark.skipif(not usable(), reason="torch has no int4 product on this CPU")
def test_what_is_not_native_takes_torchs_int4_product(native: Native) -> None:
    choice = NativeChoice(native, torch.bfloat16, EMPTY, compare=lambda *_: False)
    linear = quantized(4, dtype=torch.bfloat16)
    found = choice.settle(linear)
    assert isinstance(found, QuantizedLinear) and isinstance(found.weight, Int4Tiles)
    alike(found, linear, torch.bfloat16, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [True, False])
def test_a_layer_of_int8_is_the_same_to_the_last_bit(
    native: Native, dtype: torch.dtype, static: bool
) -> None:
    linear = Int8Linear(
        torch.randint(-127, 128, (40, 70), dtype=torch.int8),
        torch.rand(40),
        ActivationFormat("int", strategy="tensor" if static else "token", dynamic=not static),
        torch.randn(40).to(dtype),
        torch.tensor(0.02) if static else None,
    )
    found = NativeChoice(native, dtype, None).settle(linear)
    assert isinstance(found, NativeInt8)
    x = torch.randn(5, 70).to(dtype)
    assert torch.equal(found(x), linear(x))


def test_no_rows_are_no_results(native: Native) -> None:
    settle = NativeChoice(native, torch.float32, None).settle
    int8 = Int8Linear(torch.ones(4, 128, dtype=torch.int8), torch.ones(4), ActivationFormat("int"))
    for linear in (Linear(torch.randn(4, 128)), quantized(4), int8):
        assert settle(linear)(torch.empty(0, 128)).shape[0] == 0


def test_outliers_stay_with_torch(native: Native) -> None:
    form = ActivationFormat("int", outlier_threshold=6.0)
    linear = Int8Linear(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), form)
    assert NativeChoice(native, torch.float32, None).settle(linear) is linear


def test_parts_of_others_are_settled(native: Native) -> None:
    linear, form = Linear(torch.randn(32, 64)), ActivationFormat("float", 8, "token")
    settle = NativeChoice(native, torch.float32, None).settle
    rounded = settle(RoundedLinear(linear, form))
    assert isinstance(rounded, RoundedLinear) and isinstance(rounded.linear, NativeLinear)
    both = settle(SideBySide((linear, quantized(4))))
    assert isinstance(both, SideBySide)
    assert [type(part) for part in both.parts] == [NativeLinear, NativeGroups]


def test_a_table_is_in_memory_once(native: Native) -> None:
    weight = torch.randn(50, 64)
    head = NativeChoice(native, torch.float32, None).settle(Linear(weight))
    assert isinstance(head, NativeLinear)
    table, plain = NativeEmbedding(head.native, head.weight, 2.0), Embedding(weight, 2.0)
    ids = torch.tensor([3, 49, 3, 0])
    assert torch.equal(table(ids), plain(ids))
    assert table.held_by(head) and not plain.held_by(head) and plain.held_by(Linear(weight))
    assert (table.dtype, table.device) == (plain.dtype, plain.device)


def test_a_shape_is_measured_once(native: Native) -> None:
    asked: list[int] = []

    def compare(torchs: Projection, natives: Projection, inputs: int, dtype: torch.dtype) -> bool:
        asked.append(inputs)
        return inputs == 64

    choice = NativeChoice(native, torch.float32, EMPTY, compare=compare)
    kinds = [type(choice.settle(Linear(torch.randn(8, k)))) for k in (64, 32, 64, 32)]
    assert kinds == [NativeLinear, Linear, NativeLinear, Linear]
    assert asked == [64, 32] and choice.found == 2
    assert choice.measured is not None
    assert choice.measured.chosen == {"dense 8x64": "native", "dense 8x32": "torch"}


def test_what_was_measured_is_kept(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("INFOPT_KERNELS", raising=False)
    choice = native_choice("auto", CPU, torch.float32, deterministic=False)
    assert choice is not None and choice.measured is not None
    choice.compare = lambda *_: False
    choice.settle(Linear(torch.randn(8, 16)))
    choice.keep()
    again = native_choice("auto", CPU, torch.float32, deterministic=False)
    assert again is not None and again.measured is not None
    assert again.measured.chosen == {"dense 8x16": "torch"}

    def full(_: KernelChoices) -> Path:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(module, "store_choices", full)
    choice.keep()  # the next load measures again


def test_a_deterministic_engine_does_not_measure(native: Native) -> None:
    choice = native_choice("auto", CPU, torch.float32, deterministic=True)
    assert choice is not None and choice.measured is None
    assert native_choice("torch", CPU, torch.float32, deterministic=True) is None
    assert native_choice("native", CPU, torch.float16, deterministic=False) is None


def test_the_faster_one_is_told() -> None:
    def slow(calls: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def work(x: torch.Tensor) -> torch.Tensor:
            for _ in range(calls):
                x = x + 1
            return x

        return work

    class Given:
        nbytes = 0

        def __init__(self, calls: int) -> None:
            self.work = slow(calls)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.work(x)

    fast, long = Given(1), Given(2000)
    assert native_is_faster(long, fast, 8, torch.float32)
    assert not native_is_faster(fast, long, 8, torch.float32)


@pytest.mark.parametrize("bits", [3, 4])
def test_inputs_are_rounded_where_that_is_asked_for(bits: int, native: Native) -> None:
    linear = quantized(bits)
    exact = NativeChoice(native, torch.float32, None).settle(linear)
    choice = NativeChoice(native, torch.float32, None, rounds=True)
    found = choice.settle(linear)
    assert isinstance(exact, NativeGroups) and isinstance(found, NativeGroups)
    assert not exact.rounds and found.rounds is (bits == 4)
    again = choice.takes(exact)  # as it comes from a file
    assert isinstance(again, NativeGroups) and again.rounds is (bits == 4)
    x = torch.randn(5, 128)
    distance = float((found(x) - exact(x)).norm() / exact(x).norm())
    assert (0 < distance < 0.02) if bits == 4 else distance == 0
