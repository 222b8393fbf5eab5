"""Whose kernels a CPU runs: the native ones, where they were built, or torch's."""

import os

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.choose import choose_device
from infopt.core.progress import Progress, ProgressCallback
from infopt.kernels.cpu.native import Native, NativeError, NoLibraryError, load

KERNELS_VARIABLE = "INFOPT_KERNELS"
WORDS = ("auto", "native", "torch")


def wanted_kernels(word: str) -> str:
    """`word`, or for 'auto' what INFOPT_KERNELS says; raises UsageError for another word."""
    said = os.environ.get(KERNELS_VARIABLE) or "auto"
    if said not in WORDS:
        raise UsageError(f"{KERNELS_VARIABLE}={said} is not known", f"known: {', '.join(WORDS)}")
    return said if word == "auto" else word


def find_native(word: str) -> Native | None:
    """The native kernels for 'auto', 'native' or 'torch'; None where torch's are used.

    Raises UsageError for a set of instructions (INFOPT_ISA) that is not to be had, and
    UnsupportedError where 'native' is demanded of an infopt that was built without them.
    """
    wanted = wanted_kernels(word)
    if wanted == "torch":
        return None
    found = _loaded()
    if isinstance(found, Native):
        return found
    if wanted == "native":
        raise UnsupportedError(
            str(found), "install a C++ compiler, then infopt anew; or --kernels torch"
        ) from found
    return None


def _loaded() -> Native | NoLibraryError:
    """The native kernels, or why there are none; raises UsageError for a wrong INFOPT_ISA."""
    try:
        return load()
    except NoLibraryError as error:
        return error
    except NativeError as error:
        raise UsageError(str(error)) from error


def native_state() -> tuple[str, bool]:
    """What engines on a CPU would use, in words, and whether those are the native kernels.

    Raises UsageError for words in INFOPT_KERNELS and INFOPT_ISA that are not to be had.
    """
    if wanted_kernels("auto") == "torch":
        return f"torch's, as {KERNELS_VARIABLE} says", True
    found = _loaded()
    if isinstance(found, Native):
        return f"native, {found.isa}", True
    return f"{found}: torch's are used, which are slower", False


def tell_native(word: str, device: str, progress: ProgressCallback) -> None:
    """One line, as a warning, where a CPU would use native kernels and infopt has none."""
    if choose_device(device) == "cpu" and (note := native_notice(word)) is not None:
        progress(Progress("warning", note=note))


def native_notice(word: str) -> str | None:
    """What is to be said where the native kernels are wanted and missing."""
    if wanted_kernels(word) != "auto":
        return None
    try:
        state, usable = native_state()
    except UsageError:
        return None  # refused where they are loaded
    return None if usable else f"{state} (install a C++ compiler, then infopt)"
