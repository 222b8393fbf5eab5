"""The header of a GGUF file: its fields and where its tensors lie; every length is checked.

Little-endian GGUF versions 2 and 3. The `gguf` package's reader is not used: a damaged length
makes it loop without end.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.core.errors import ArtifactError, UnsupportedError

# Tensor types by their number: name, elements a block, bytes a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Named in the refusal only.
_OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as it is stored; `shape` in row-major order, the last dimension contiguous."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    nbytes: int

    @property
    def type_name(self) -> str:
        return TYPES[self.type][0]


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header; raises ArtifactError for damage, UnsupportedError for other types."""
    try:
        with path.open("rb") as stream:
            if path.stat().st_size < 24:
                raise ArtifactError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).file()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    """Walks through the header; no step leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = 0

    def file(self) -> GgufFile:
        if self.data[:4] != b"GGUF":
            raise ArtifactError(f"{self.path} is no GGUF file: it does not begin with 'GGUF'")
        self.position = 4
        version = self.number("I")
        if version not in (2, 3):
            raise UnsupportedError(
                f"{self.path} is GGUF version {version}", "known: 2 and 3, little-endian"
            )
        tensors, fields = self.number("Q"), self.number("Q")
        table = dict(self.field() for _ in self.counted(fields, 13, "fields"))
        infos = [self.tensor_info() for _ in self.counted(tensors, 25, "tensors")]
        alignment = table.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in infos:
            if name in found:
                raise self.damaged(f"it has two tensors {name!r}")
            found[name] = self.tensor(name, kind, shape, start + offset)
        return GgufFile(self.path, table, found)

    def damaged(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is cut short or damaged: {why}", "download or convert it again"
        )

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.size:
            raise self.damaged(f"the header runs past the end at byte {self.size}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def counted(self, count: int, least: int, what: str) -> range:
        """range(count), if the rest of the file can hold so many items of `least` bytes."""
        if count * least > self.size - self.position:
            raise self.damaged(f"it claims {count} {what}")
        return range(count)

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"a string before byte {self.position} is not UTF-8") from None

    def field(self) -> tuple[str, Any]:
        name = self.string()
        return name, self.value(self.number("I"), name)

    def value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner = self.number("I")
            count = self.number("Q")
            if inner == _STRING:
                return [self.string() for _ in self.counted(count, 8, f"strings in {name!r}")]
            if inner in _SCALARS:
                code = _SCALARS[inner]
                self.counted(count, struct.calcsize(code), f"numbers in {name!r}")
                size = count * struct.calcsize("<" + code)
                return list(struct.unpack(f"<{count}{code}", self.take(size)))
            raise self.damaged(f"the field {name!r} is an array of the unknown kind {inner}")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        raise self.damaged(f"the field {name!r} is of the unknown kind {kind}")

    def tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, self.number("I"), shape[::-1], self.number("Q")

    def tensor(self, name: str, kind: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
        if kind not in TYPES:
            known = ", ".join(word for word, _, _ in TYPES.values())
            word = _OTHER_TYPES.get(kind, f"number {kind}")
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is of the type {word}", f"known: {known}"
            )
        _, elements, block_bytes = TYPES[kind]
        if 0 in shape or shape[-1] % elements:
            raise self.damaged(f"tensor {name!r} has the shape {list(shape)}")
        nbytes = math.prod(shape) // elements * block_bytes
        if offset + nbytes > self.size:
            missing = offset + nbytes - self.size
            raise self.damaged(f"{missing} bytes of tensor {name!r} are missing")
        return GgufTensor(name, kind, shape, offset, nbytes)
