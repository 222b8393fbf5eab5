"""The native kernels, built where there is a C++ compiler; without one, infopt works on torch."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).resolve().parent / "kernels" / "cpu" / "src"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# GCC 12 takes its own headers' undefined vectors for mistakes.
COMMON += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
_AVX512 = [
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16",
    "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512",
]  # fmt: skip
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": _AVX512,
    "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprfchw"],
}


class BuildNative(build_ext):
    """Each op is compiled once for each set of instructions that the compiler knows."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a module of Python's: loaded by ctypes, the same for every version of it.
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        try:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            build(target, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or error
            self.warn(f"the native kernels were not built, torch's are used: {told}")


def build(target: Path, folder: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile and link `target`; raises FileNotFoundError, CalledProcessError."""
    compiler = os.environ.get("CXX") or next(
        (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
    )
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    command = [*compiler.split(), *COMMON, *extra]
    ops = sorted((SOURCES / "ops").glob("*.cpp"))
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = {"portable": [], **(X86 if x86 else {})}
    newest = max(path.stat().st_mtime for path in (*SOURCES.glob("*.h"), Path(__file__)))
    jobs = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for isa, flags in sets.items():
            for source in ops:
                out = folder / f"{source.stem}-{isa}.o"
                line = [*command, *flags, f"-DINFOPT_ISA={isa}", "-c", str(source), "-o", str(out)]
                known = max(newest, source.stat().st_mtime)
                if out.exists() and out.stat().st_mtime > known:
                    line = ["true"]
                jobs[isa, out] = pool.submit(_run, line)
    failed = {isa for (isa, _), job in jobs.items() if job.exception() is not None}
    if "portable" in failed:
        for job in jobs.values():
            job.result()
    objects = [str(out) for isa, out in jobs if isa not in failed]
    defined = [f"-DINFOPT_HAS_{isa.upper()}" for isa in sets if isa not in failed]
    for name in ("library", "pool"):
        out = str(folder / f"{name}.o")
        _run([*command, *defined, "-c", str(SOURCES / f"{name}.cpp"), "-o", out])
        objects.append(out)
    # Written beside and moved: a process that has the old library mapped keeps it.
    fresh = target.with_suffix(".new")
    _run([*command, "-shared", "-pthread", *objects, "-o", str(fresh)])
    fresh.replace(target)


def _run(line: list[str]) -> None:
    subprocess.run(line, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    # setuptools wants names from here.
    found = (path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
    files = sorted(os.path.relpath(path) for path in found)
    native = Extension(
        "infopt.kernels.cpu._native",
        sources=[name for name in files if name.endswith(".cpp")],
        depends=[name for name in files if name.endswith(".h")],
        language="c++",
        optional=True,
    )
    setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
