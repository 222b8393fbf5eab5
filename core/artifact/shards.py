"""Safetensors files written from a stream, one tensor in memory at a time, and read back."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from infopt.core.artifact.headers import DTYPES
from infopt.core.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 20
_BITS = {word: bits for word, bits in DTYPES.values()}
_CODES = {word: code for code, (word, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished file; `names` are its tensors."""

    file: Path
    names: tuple[str, ...]
    data_bytes: int


@dataclass(frozen=True, slots=True)
class _Spooled:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str


class ShardWriter:
    """Collects tensors into files of at most `shard_bytes` of data (a larger tensor has its own).

    The header of a safetensors file comes first and its tensors lie in order of alignment, so a
    stream is spooled to the disk and then copied into place, shard by shard.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._spool_file = folder / ".spool"
        self._spool: IO[bytes] | None = None
        self._entries: list[_Spooled] = []
        self._size = 0
        self._names: set[str] = set()
        self._shards: list[Shard] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        """Spool one tensor; nothing of it stays in memory."""
        assert name not in self._names, f"{name} was written already"
        self._names.add(name)
        data = tensor.detach().cpu().contiguous()
        raw = _raw(data)
        if self._entries and self._size + len(raw) > self._limit:
            self._close()
        if self._spool is None:
            self._spool = self._spool_file.open("wb")
        self._spool.write(raw)
        dtype = str(data.dtype).removeprefix("torch.")
        digest = hashlib.sha256(raw).hexdigest()
        entry = _Spooled(name, dtype, tuple(data.shape), self._size, len(raw), digest)
        self._entries.append(entry)
        self._size += len(raw)

    def finish(self) -> list[Shard]:
        """The finished shards, in order; each tensor was read back and compared."""
        if self._entries:
            self._close()
        return self._shards

    def _close(self) -> None:
        assert self._spool is not None
        self._spool.close()
        # The order of the safetensors library: widest elements first, so that each is aligned.
        entries = sorted(self._entries, key=lambda e: (-_BITS[e.dtype], e.name))
        file = self._folder / f"shard-{len(self._shards):05d}.safetensors"
        with file.open("wb") as out, self._spool_file.open("rb") as spool:
            out.write(_header(entries))
            for entry in entries:
                _copy(spool, out, entry)
        self._spool_file.unlink()
        _compare(file, entries)
        self._shards.append(Shard(file, tuple(e.name for e in entries), self._size))
        self._spool, self._entries, self._size = None, [], 0


def _header(entries: list[_Spooled]) -> bytes:
    """Length and JSON header, padded with spaces to a multiple of 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _raw(tensor: "Tensor") -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    import torch

    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _copy(spool: IO[bytes], out: IO[bytes], entry: _Spooled) -> None:
    spool.seek(entry.offset)
    left = entry.nbytes
    while left:
        chunk = spool.read(min(left, _CHUNK))
        assert chunk, "the spool is shorter than what was written to it"
        out.write(chunk)
        left -= len(chunk)


def _compare(file: Path, entries: list[_Spooled]) -> None:
    """Read every tensor back with the library that others use, and hold it to its digest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            for entry in entries:
                tensor: Tensor = stream.get_tensor(entry.name)
                raw = _raw(tensor)
                same = hashlib.sha256(raw).hexdigest() == entry.sha256
                if not same or tuple(tensor.shape) != entry.shape:
                    raise ResourceError(
                        f"tensor {entry.name!r} read back from {file.parent} differs from what was"
                        " written",
                        "nothing was kept; the disk or the memory of this machine may be faulty",
                    )
    except SafetensorError as error:
        raise ResourceError(f"{file.parent}: the weights cannot be read back: {error}") from error
