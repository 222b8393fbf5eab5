"""The tests of the kernels once more, under the address and undefined-behaviour sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FLAGS = (
    "-O1", "-g", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_out_of_bounds_and_nothing_undefined(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    # C++'s own library with it, or exceptions of others would not be found.
    names = ("libasan.so", "libstdc++.so.6")
    runtimes = [_output(compiler, f"-print-file-name={name}") for name in names]
    if not all(Path(runtime).is_file() for runtime in runtimes):
        pytest.skip("g++ has no address sanitizer")
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    library = tmp_path / "sanitized.so"
    build.build(library, tmp_path / "objects", FLAGS)
    here = Path(__file__).parent
    tests = [
        str(here / f"test_{name}.py")
        for name in ("native", "dense", "groups", "groups8", "int8", "solve")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env={
            **os.environ,
            "INFOPT_TEST_LIBRARY": str(library),
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


def _output(*line: str) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()
