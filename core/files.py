"""Writing so that a crash, a full disk or a kill leaves the old state or the new one, never half."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infopt.core.errors import ResourceError

_CHUNK = 1 << 20


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a refused permission into one clear line about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left on the disk while writing {path}",
                "nothing was changed; free some space or choose another --output",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(f"cannot write {path}: {error.strerror}") from error
        raise


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file beside its place, then rename it there."""
    data = content.encode() if isinstance(content, str) else content
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


@contextmanager
def directory_atomically(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it takes the place of `path`, else it is removed.

    With `replace` an existing `path` is moved aside first and removed after, so that a crash
    between the two renames leaves both beside each other, and loses nothing.
    """
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_file(file)
            os.chmod(temporary, 0o755)
            _swap_in(temporary, path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_directory(path.parent)


def _swap_in(temporary: Path, path: Path, replace: bool) -> None:
    fsync_directory(temporary)
    old: Path | None = None
    if path.exists() and replace:
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        if old is not None:
            os.rename(old, path)
        raise
    if old is not None:
        shutil.rmtree(old)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
