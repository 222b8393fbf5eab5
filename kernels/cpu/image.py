"""Packed weights in a file, one behind the other as they lie in memory.

A safetensors file of a single tensor, bytes; what lies where in it, and what its maker told of it,
is JSON in the file's metadata. No such file is trusted: what does not fit is an ImageError.
"""

import json
import math
import os
import secrets
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from infopt.kernels.cpu.arena import region

KEY = "infopt.packed"
_LINE, _PAGE = 64, 4096
_MOST_HEADER = 64 << 20
_PIECE = 32 << 20
_STALE_S = 3600.0
_TYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16,
        torch.int32,
    )
}  # fmt: skip


class ImageError(Exception):
    """A file that is no image, is damaged, or is of something else; one line says why."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a file holds."""

    about: dict[str, Any]
    tensors: tuple[Tensor, ...]


def write_image(file: Path, about: Mapping[str, Any], tensors: Sequence[Tensor]) -> int:
    """Write an image beside its place and move it there; returns its bytes. Raises OSError.

    Readers and writers of the same file may go on meanwhile: they have the old one or the new one.
    """
    folder = file.parent
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(file)
    temporary = folder / f".{file.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as out:
            size = _write(out, about, tensors)
        # Not made durable: a sum over the bytes tells what a crash left of them.
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


def _sweep(file: Path) -> None:
    """Remove what writers left that were killed."""
    for left in file.parent.glob(f".{file.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                left.unlink()


def _write(out: IO[bytes], about: Mapping[str, Any], tensors: Sequence[Tensor]) -> int:
    places, total, offset = [], 0, 0
    whole = [_filled(tensor) for tensor in tensors]
    for tensor, filled in zip(tensors, whole, strict=True):
        places.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset])
        total += int(filled.view(torch.int64).sum())
        offset += len(filled)
    told = json.dumps({"about": about, "tensors": places, "sum": total % 2**64})
    header = json.dumps(
        {
            "__metadata__": {KEY: told},
            "bytes": {"dtype": "U8", "shape": [offset], "data_offsets": [0, offset]},
        }
    ).encode()
    header += b" " * (-(len(header) + 8) % _PAGE)
    out.write(struct.pack("<Q", len(header)) + header)
    for filled in whole:
        out.write(_memory(filled))
    return 8 + len(header) + offset


def _filled(tensor: Tensor) -> Tensor:
    """Its bytes, up to whole cache lines."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, -len(raw) % _LINE))


def _memory(data: Tensor) -> memoryview:
    flat: Any = data.numpy()
    return memoryview(flat)


def read_image(file: Path, accept: Callable[[dict[str, Any]], None], threads: int) -> Image:
    """The image, its tensors in large pages.

    `accept` is told what the file is about before its bytes are read, and raises ImageError where
    it is of something else. Raises ImageError for what is wrong with the file, FileNotFoundError
    where there is none.
    """
    try:
        with file.open("rb") as stream:
            if hasattr(os, "geteuid") and os.fstat(stream.fileno()).st_uid != os.geteuid():
                raise ImageError("it belongs to somebody else")
            about, places, begin, size, total = _header(stream)
            accept(about)
            data = _read(stream.fileno(), begin, size, threads)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ImageError(f"it cannot be read: {error.strerror}") from error
    if int(data.view(torch.int64).sum()) % 2**64 != total:
        raise ImageError("its bytes are not those that were written")
    return Image(about, tuple(_tensor(data, place) for place in places))


def _header(stream: IO[bytes]) -> tuple[dict[str, Any], list[Any], int, int, int]:
    """What the file is about, what lies where, where the bytes begin, how many, their sum."""
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= _MOST_HEADER:
        raise ImageError("it is no file of packed weights")
    try:
        header = json.loads(stream.read(length))
        told = json.loads(header["__metadata__"][KEY])
        about, places, total = told["about"], told["tensors"], told["sum"]
        size = header["bytes"]["shape"][0]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ImageError("it is no file of packed weights") from None
    if not isinstance(about, dict) or not isinstance(places, list) or type(total) is not int:
        raise ImageError("it is no file of packed weights")
    begin = 8 + length
    if type(size) is not int or size % _LINE or os.fstat(stream.fileno()).st_size != begin + size:
        raise ImageError("it is cut short")
    return about, places, begin, size, total


def _read(descriptor: int, begin: int, size: int, threads: int) -> Tensor:
    data = region(size)
    view = _memory(data)

    def piece(start: int) -> None:
        end = min(start + _PIECE, size)
        while start < end:
            count = os.preadv(descriptor, [view[start:end]], begin + start)
            if not count:
                raise ImageError("it is cut short")
            start += count

    # Half of the time goes into pages that the system has to fill with zeros first.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, range(0, size, _PIECE)))
    return data


def _tensor(data: Tensor, place: Any) -> Tensor:
    try:
        name, shape, offset = place
        dtype = _TYPES[name]
        numbers = (offset, *shape)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ImageError("its table is wrong")
        nbytes = math.prod(shape) * dtype.itemsize
    except (ValueError, LookupError, TypeError):
        raise ImageError("its table is wrong") from None
    if offset % _LINE or offset + nbytes > len(data):
        raise ImageError("its table is wrong")
    return data[offset : offset + nbytes].view(dtype).view(shape)
