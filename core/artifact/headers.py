"""The header of a safetensors file, read without torch: names, shapes, dtypes."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.core.errors import ArtifactError

# The format's own limit; a length beyond it is a corrupt file, not a large model.
_MAX_HEADER = 100_000_000

# safetensors dtype -> torch's name and bits per element.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a file declares it; `dtype` is torch's name for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, every offset checked against the file's size.

    Raises ArtifactError naming the file where it is unreadable, cut short or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _corrupt(file, f"it has {size} bytes")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(_MAX_HEADER, size - 8):
                raise _corrupt(file, f"its header claims {length} bytes, the file has {size}")
            raw = stream.read(length)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _corrupt(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a table")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorHeader] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        begin, end, tensors[name] = _tensor(file, name, entry)
        spans.append((begin, end))
    _check_spans(file, sorted(spans), size - 8 - length)
    return tensors


def _tensor(file: Path, name: str, entry: Any) -> tuple[int, int, TensorHeader]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _corrupt(file, f"tensor {name!r} has no dtype, shape or offsets") from None
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _corrupt(file, f"tensor {name!r} has a shape or offset that is no natural number")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(
            f"{file}: tensor {name!r} has the dtype {dtype!r}, which is not known",
            f"known: {', '.join(DTYPES)}",
        )
    word, bits = DTYPES[dtype]
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise _corrupt(
            file, f"tensor {name!r} {list(shape)} of {dtype} lies in {end - begin} bytes"
        )
    return begin, end, TensorHeader(file, word, shape, end - begin)


def _check_spans(file: Path, spans: list[tuple[int, int]], available: int) -> None:
    """The tensors lie one behind the other and fill the file: no gap, no overlap."""
    position = 0
    for begin, end in spans:
        if begin != position:
            raise _corrupt(file, "its tensors overlap or leave a gap")
        position = end
    if position > available:
        raise _corrupt(file, f"{position - available} bytes of tensor data are missing")
    if position < available:
        raise _corrupt(file, f"{available - position} bytes follow the last tensor")


def _corrupt(file: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{file} is cut short or not a safetensors file: {why}", "download or write it again"
    )
