"""The library, its pool of threads, and how it is refused."""

import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch

from infopt.kernels.cpu.native import (
    Call,
    CountArgs,
    Native,
    NativeError,
    ReadArgs,
    call,
    in_order,
    load,
    usable_isas,
)


def counted(native: Native, n: int, calls: int, parts: int, threads: int) -> torch.Tensor:
    numbers = torch.zeros(n, dtype=torch.int32)
    args = CountArgs(numbers.data_ptr(), n)
    one = call(native.op("count", CountArgs), args, parts)
    native.run(in_order([one] * calls), threads)
    return numbers


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [0, 1, 2, 5, 64, 100_000])
def test_each_number_is_met_once_by_each_call(native: Native, threads: int, parts: int) -> None:
    assert (counted(native, 1013, 37, parts, threads) == 37).all()


def test_calls_of_one_part_and_of_many_follow_each_other(native: Native) -> None:
    numbers = torch.zeros(999, dtype=torch.int32)
    args = CountArgs(numbers.data_ptr(), len(numbers))
    op = native.op("count", CountArgs)
    calls = in_order([call(op, args, parts) for parts in (1, 8, 1, 1, 3, 1) * 50])
    for _ in range(20):
        native.run(calls, 3)
    assert (numbers == 6000).all()


def test_callers_in_several_threads_wait_for_each_other(native: Native) -> None:
    found: list[bool] = []

    def work() -> None:
        found.append(all(bool((counted(native, 501, 5, 4, 2) == 5).all()) for _ in range(50)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_a_forked_child_has_threads_of_its_own(native: Native) -> None:
    assert (counted(native, 100, 3, 4, 2) == 3).all()
    child = os.fork()
    if child == 0:
        right = bool((counted(native, 100, 3, 4, 2) == 3).all())
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (counted(native, 100, 3, 4, 2) == 3).all()


@pytest.mark.parametrize("n", [0, 1, 63, 64, 4097])
def test_read_sums_all_words(native: Native, n: int) -> None:
    words = torch.randint(0, 1 << 40, (n,), dtype=torch.int64)
    sums = torch.full((5,), -1, dtype=torch.int64)
    args = ReadArgs(words.data_ptr(), n, sums.data_ptr())
    one = call(native.op("read", ReadArgs), args, 5)
    native.run_one(one, 2)
    assert sums.sum() == words.sum()


def test_an_op_of_other_arguments_is_refused(native: Native) -> None:
    with pytest.raises(NativeError, match="count"):
        native.op("count", Call)
    with pytest.raises(NativeError, match="nothing"):
        native.op("nothing", CountArgs)


def test_the_environment_forces_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        usable = usable_isas()
    except NativeError as error:
        pytest.skip(str(error))
    assert load().isa == usable[-1]
    for isa in usable:
        monkeypatch.setenv("INFOPT_ISA", isa)
        assert load().isa == isa
    monkeypatch.setenv("INFOPT_ISA", "sse9")
    with pytest.raises(NativeError, match="sse9 is no set"):
        load()


def test_a_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infopt.kernels.cpu.native.usable_isas", lambda _: ("portable",))
    with pytest.raises(NativeError, match="INFOPT_ISA=avx512: this CPU or"):
        load("avx512")


def test_a_missing_or_broken_library_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match="were not built"):
        load(file=tmp_path / "none.so")
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    with pytest.raises(NativeError, match="cannot be loaded"):
        load(file=broken)


def test_structures_are_as_large_as_the_library_says() -> None:
    assert ctypes.sizeof(Call) == 40


def test_a_library_of_another_version_is_refused() -> None:
    """A call that is misread would end the process: torch's kernels run."""
    other = Path(torch.__file__).parent / "lib" / "libc10.so"
    with pytest.raises(NativeError, match="another version"):
        load(file=other)
