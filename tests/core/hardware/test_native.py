"""Whose kernels a CPU runs, and what is said where there are none."""

import pytest

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware import native as module
from infopt.core.hardware.native import find_native, native_notice, tell_native, wanted_kernels
from infopt.core.progress import Progress
from infopt.kernels.cpu.native import NativeError, NoLibraryError


def none_built() -> None:
    raise NoLibraryError("the native kernels were not built (no such file)")


def refused() -> None:
    raise NativeError("INFOPT_ISA=avx512: this CPU or the build of infopt has portable")


def test_the_state_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFOPT_ISA", raising=False)
    monkeypatch.setenv("INFOPT_KERNELS", "torch")
    assert module.native_state() == ("torch's, as INFOPT_KERNELS says", True)
    monkeypatch.setenv("INFOPT_KERNELS", "fast")
    with pytest.raises(UsageError, match="INFOPT_KERNELS=fast"):
        module.native_state()
    monkeypatch.delenv("INFOPT_KERNELS")

    def none_built() -> None:
        raise NoLibraryError("the native kernels were not built")

    monkeypatch.setattr(module, "load", none_built)
    state, usable = module.native_state()
    assert "were not built" in state and not usable


def test_the_environment_speaks_where_the_settings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFOPT_KERNELS", raising=False)
    assert wanted_kernels("auto") == "auto"
    monkeypatch.setenv("INFOPT_KERNELS", "torch")
    assert wanted_kernels("auto") == "torch" and wanted_kernels("native") == "native"
    assert find_native("auto") is None
    monkeypatch.setenv("INFOPT_KERNELS", "cuda")
    with pytest.raises(UsageError, match="INFOPT_KERNELS=cuda"):
        find_native("auto")


def test_without_a_library_torch_serves_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INFOPT_KERNELS", raising=False)
    monkeypatch.setattr(module, "load", none_built)
    assert find_native("auto") is None
    told: list[Progress] = []
    tell_native("auto", "cpu", told.append)
    assert [one.stage for one in told] == ["warning"]
    assert "were not built" in told[0].note and "\n" not in told[0].note
    tell_native("torch", "cpu", told.append)
    assert len(told) == 1
    with pytest.raises(UnsupportedError, match="were not built"):
        find_native("native")


def test_a_set_of_instructions_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INFOPT_KERNELS", raising=False)
    monkeypatch.setattr(module, "load", refused)
    for word in ("auto", "native"):
        with pytest.raises(UsageError, match="INFOPT_ISA=avx512"):
            find_native(word)
    assert native_notice("auto") is None
    assert find_native("torch") is None
