"""The last tier: what evicted prefix blocks held, in files that outlive the process."""

import hashlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.errors import ResourceError, UsageError
from infopt.core.files import disk_faults

# A file is this, the SHA-256 over its key and its content, and the content.
_MAGIC = b"infopt1\0"
_HEAD_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_NAME = re.compile(r"[0-9a-f]{64}\.kv")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.kv\.[0-9a-f]{8}\.tmp")
# Nobody writes one file for so long: its writer was killed.
_ABANDONED_S = 3600.0
# Of the limit: what is written until the folder is looked at again for what others wrote there.
_UNSEEN = 1 / 16


class PrefixDisk:
    """Contents of blocks by their digests, in up to `limit` bytes of files in one folder.

    The files of several models may lie side by side: a file's name, and the checksum in it, are
    made of `identity` and the digest, so that no engine finds what another computed otherwise. The
    least recently used file goes first, whosever it is: its time of modification says when it was
    used last, to this process and to others. Processes may share the folder; each sees to the limit
    with what it knows, and looks again every so often. A file that is cut off, changed or gone is
    as if it had never been there, and so is one that cannot be written.

    Raises UsageError for a folder that others may enter or that is not ours, and for a limit that
    holds no block; ResourceError where the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        *,
        identity: bytes,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.folder = folder
        self.limit = limit
        self.nbytes = 0
        """Of the files, as far as known."""
        self._identity = identity
        self._shape, self._dtype = shape, dtype
        self._file_bytes = _HEAD_BYTES + math.prod(shape) * dtype.itemsize
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._unreadable: set[str] = set()
        self._unseen = 0
        if limit < self._file_bytes:
            raise UsageError(
                f"prefix_disk_bytes {limit} holds no block of {self._file_bytes} bytes"
            )
        _make_private(folder)
        self._look()
        self._keep_to_limit()

    def __contains__(self, digest: bytes) -> bool:
        name = self._name(digest)
        if name in self._unreadable:
            return False
        if name in self._sizes:
            return True
        try:
            size = (self.folder / name).stat().st_size
        except OSError:
            return False
        self._note(name, size)  # another process put it there
        return True

    def get(self, digest: bytes) -> Tensor | None:
        """What was put under this digest, which is then the most recently used.

        None where it cannot be had any more; it is then no longer contained either.
        """
        name = self._name(digest)
        file = self.folder / name
        try:
            with file.open("rb") as stream:
                data = bytearray(self._file_bytes + 1)
                size = stream.readinto(data)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._unreadable.add(name)
            self._forget(name)
            return None
        content = memoryview(data)[_HEAD_BYTES : self._file_bytes]
        if size != self._file_bytes or data[:_HEAD_BYTES] != _head(name, content):
            self._unreadable.add(name)
            self._remove(name)
            return None
        self._unreadable.discard(name)
        self._touch(name)
        flat = torch.frombuffer(
            data, dtype=self._dtype, count=math.prod(self._shape), offset=_HEAD_BYTES
        )
        return flat.view(self._shape)

    def put(self, digest: bytes, content: Tensor) -> None:
        """Keep the content, if the disk takes it; one that is kept already becomes the latest."""
        assert content.shape == self._shape and content.dtype == self._dtype
        name = self._name(digest)
        if name in self._sizes and self._touch(name):
            self._keep_to_limit()  # another process may have added to what was found since
            return
        try:
            self._write(name, content.contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError:  # full, or gone: a cache may forget, a request may not fail for it
            return
        self._unreadable.discard(name)
        self._note(name, self._file_bytes)
        self._unseen += self._file_bytes
        if self._unseen > self.limit * _UNSEEN:
            self._look()
        self._keep_to_limit()

    def _name(self, digest: bytes) -> str:
        return f"{hashlib.sha256(self._identity + digest).hexdigest()}.kv"

    def _write(self, name: str, content: memoryview) -> None:
        """Beside its place, then renamed. Not synced: the checksum finds what a crash tears."""
        temporary = self.folder / f"{name}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("xb", buffering=0) as stream:
                for part in (_head(name, content), content):
                    if stream.write(part) != len(part):
                        raise OSError("the disk took only a part")
                _stamp(stream.fileno())
            temporary.replace(self.folder / name)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _touch(self, name: str) -> bool:
        """Make it the latest; False where it is not there any more."""
        try:
            _stamp(self.folder / name)
        except OSError:
            self._forget(name)
            return False
        self._note(name, self._file_bytes)
        return True

    def _note(self, name: str, size: int) -> None:
        """It is there, and the most recently used."""
        self.nbytes += size - self._sizes.pop(name, 0)
        self._sizes[name] = size

    def _forget(self, name: str) -> None:
        self.nbytes -= self._sizes.pop(name, 0)

    def _remove(self, name: str) -> None:
        self._forget(name)
        with suppress(OSError):
            (self.folder / name).unlink()

    def _keep_to_limit(self) -> None:
        while self.nbytes > self.limit:
            self._remove(next(iter(self._sizes)))

    def _look(self) -> None:
        """Learn what is in the folder, by the time of its last use, and sweep what was begun."""
        found: list[tuple[int, str, int]] = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another process removes files, too
                    told = entry.stat(follow_symlinks=False)
                    if _NAME.fullmatch(entry.name):
                        found.append((told.st_mtime_ns, entry.name, told.st_size))
                    elif _UNFINISHED.fullmatch(entry.name) and _is_abandoned(told):
                        Path(entry.path).unlink()
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
        self.nbytes = sum(self._sizes.values())
        self._unseen = 0


def block_identity(
    artifact: Artifact,
    device: torch.device,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    **others: str | bool,
) -> bytes:
    """SHA-256 over all that a block's content depends on beside its tokens.

    The weights count by their contents, not by their names and dates, which copies and images of
    containers keep or set alike: so this reads every weight file once. `shape` and `dtype` are a
    block's; `others` what else the engine computes by.
    """
    said = {
        "model": artifact.fingerprint(),
        "config": artifact.config,
        "shape": shape,
        "dtype": str(dtype),
        "device": _device_word(device),
        "byte order": sys.byteorder,
        "infopt": version("infopt"),
        "torch": torch.__version__,
        **others,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def _device_word(device: torch.device) -> str:
    """What its kernels depend on: other instructions round otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _head(name: str, content: memoryview) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(content)
    return _MAGIC + digest.digest()


def _is_abandoned(told: os.stat_result) -> bool:
    return time.time() - told.st_mtime > _ABANDONED_S


def _stamp(file: int | Path) -> None:
    """Used now. Said by us: a file system's own clock may stand still for milliseconds."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _make_private(folder: Path) -> None:
    """See that the folder is there, ours, and entered by nobody else: it holds what users wrote."""
    try:
        with disk_faults(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            ours = folder.stat().st_uid == os.getuid()
            if ours and not any(folder.iterdir()):
                folder.chmod(0o700)
            others = folder.stat().st_mode & 0o077
            probe = folder / f"{'0' * 64}.kv.{secrets.token_hex(4)}.tmp"
            probe.touch()
            probe.unlink()
    except ResourceError as error:
        raise ResourceError(error.message, "choose another --prefix-disk") from error
    if not ours:
        raise UsageError(f"the folder {folder} is another user's", "choose another --prefix-disk")
    if others:
        raise UsageError(
            f"others may enter {folder}, and prefixes hold what users wrote",
            f"chmod 700 {folder}, or choose another --prefix-disk",
        )
