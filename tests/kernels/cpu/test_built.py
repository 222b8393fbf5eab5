"""Where there is a compiler there is a library of these very sources: builds fail quietly."""

import os
import shutil
from pathlib import Path

import pytest

from infopt.kernels.cpu import native as module
from infopt.kernels.cpu.native import load

FOLDER = Path(module.__file__).parent


def test_the_library_is_of_these_sources() -> None:
    compilers = ("c++", "g++", "clang++")
    if "CXX" not in os.environ and not any(map(shutil.which, compilers)):
        pytest.skip("there is no C++ compiler")
    load()
    built = (FOLDER / "_native.so").stat().st_mtime
    newer = [path.name for path in (FOLDER / "src").rglob("*.*") if path.stat().st_mtime > built]
    assert not newer, "python setup.py build_ext --inplace says why they are not built"
