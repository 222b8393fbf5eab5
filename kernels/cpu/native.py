"""The library of native kernels: found, checked, and its ops called on its pool of threads."""

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

ISA_VARIABLE = "INFOPT_ISA"
"""An environment variable that names the set of instructions to use, one that the CPU has."""
ISAS = ("portable", "avx2", "avx512", "amx")
"""By their numbers in the library; the last that the CPU has is used."""
_FILE = Path(__file__).with_name("_native.so")


class NativeError(Exception):
    """The native kernels cannot be used as was asked; one line says why."""


class NoLibraryError(NativeError):
    """There is no library, or none that can be loaded."""


class Call(ctypes.Structure):
    """One op to run: pool.h's `Call`. Tensors that its arguments point to must outlive it."""

    held: object = None
    _fields_ = (
        ("op", c_void_p), ("args", c_void_p), ("parts", c_int64), ("ahead", c_void_p),
        ("ahead_bytes", c_int64),
    )  # fmt: skip


class CountArgs(ctypes.Structure):
    """`count`: adds 1 to each of int32 [n]."""

    _fields_ = (("numbers", c_void_p), ("n", c_int64))


class ReadArgs(ctypes.Structure):
    """`read`: sums uint64 [n] words, share by share, into uint64 [parts]."""

    _fields_ = (("words", c_void_p), ("n", c_int64), ("sums", c_void_p))


class Native:
    """The loaded library, with one set of instructions."""

    def __init__(self, library: ctypes.CDLL, isa: str) -> None:
        self.isa = isa
        self._library = library
        self._run = library.infopt_run

    def op(self, name: str, args: type[ctypes.Structure]) -> int:
        """The address of an op whose arguments are `args`; raises NativeError for none such."""
        found = self._library.infopt_op(ISAS.index(self.isa), name.encode(), ctypes.sizeof(args))
        if not found:
            raise NativeError(f"the native library has no op {name} of these arguments: build anew")
        return int(found)

    def has(self, name: str, args: type[ctypes.Structure]) -> bool:
        """Whether there is such an op for this set of instructions."""
        found = self._library.infopt_op(ISAS.index(self.isa), name.encode(), ctypes.sizeof(args))
        return bool(found)

    def run(self, calls: "ctypes.Array[Call]", threads: int) -> None:
        """Run calls one after the other, each on up to `threads` threads; returns when all are
        done. Other threads of Python run meanwhile."""
        self._run(calls, len(calls), threads)

    @property
    def build(self) -> str:
        """What tells this build of the library from others."""
        found = _FILE.stat()
        return f"{found.st_size}-{int(found.st_mtime)}"

    def run_one(self, call: Call, threads: int) -> None:
        """As `run`, of a single call."""
        self._run(ctypes.byref(call), 1, threads)


def call(op: int, args: ctypes.Structure, parts: int) -> Call:
    """A call of `op`, its work cut into `parts`."""
    made = Call(op, ctypes.addressof(args), parts)
    made.held = args
    return made


def in_order(calls: Sequence[Call]) -> "ctypes.Array[Call]":
    """Calls as `Native.run` takes them."""
    array = (Call * len(calls))(*calls)
    array.held = calls  # type: ignore[attr-defined]
    return array


def threads_at_hand() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_isas(file: Path = _FILE) -> tuple[str, ...]:
    """The sets of instructions that the library has and this CPU has, the simplest first.

    Raises NativeError where there is no library that can be loaded.
    """
    found = _library(file).infopt_usable()
    return tuple(isa for number, isa in enumerate(ISAS) if found >> number & 1)


def load(isa: str | None = None, file: Path = _FILE) -> Native:
    """The library with the set of instructions `isa`; default: INFOPT_ISA's, else the CPU's best.

    Raises NativeError where there is no library, or the set is unknown or not to be had.
    """
    usable = usable_isas(file)
    wanted = isa or os.environ.get(ISA_VARIABLE) or usable[-1]
    if wanted not in ISAS:
        raise NativeError(f"{ISA_VARIABLE}={wanted} is no set of instructions: {', '.join(ISAS)}")
    if wanted not in usable:
        have = ", ".join(usable)
        raise NativeError(f"{ISA_VARIABLE}={wanted}: this CPU or the build of infopt has {have}")
    return Native(_library(file), wanted)


@cache
def _library(file: Path) -> ctypes.CDLL:
    if not file.exists():
        raise NoLibraryError("the native kernels were not built")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise NoLibraryError(f"the native kernels cannot be loaded ({error})") from error
    if not hasattr(library, "infopt_call_bytes") or _call_bytes(library) != ctypes.sizeof(Call):
        raise NoLibraryError("the native kernels are of another version of infopt: build anew")
    library.infopt_usable.restype = c_int
    library.infopt_op.argtypes = (c_int, c_char_p, c_int64)
    library.infopt_op.restype = c_void_p
    library.infopt_run.argtypes = (POINTER(Call), c_int64, c_int)
    library.infopt_run.restype = None
    return library


def _call_bytes(library: ctypes.CDLL) -> int:
    library.infopt_call_bytes.restype = c_int64
    return int(library.infopt_call_bytes())
