"""Writing so that a crash, a full disk or a kill leaves the old state or the new, never half."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from infopt.core.errors import ResourceError, UsageError

MANIFEST = "manifest.json"
"""Lists the files of a directory that infopt made; only such a directory is ever replaced."""
_CHUNK = 1 << 20


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a refused permission into one line about `path`."""
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
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ResourceError(f"cannot write {path}: {error.strerror}") from error
        raise


def check_output(path: Path, *, replace: bool) -> None:
    """See that a new directory may take the place of `path`; raises UsageError where not.

    With `replace` a directory made by infopt (its manifest.json says so) or an empty one may go;
    anything else stays, so that a mistyped path never costs a home directory.
    """
    if path.is_dir():
        if not any(path.iterdir()):
            return
        if not replace:
            raise UsageError(
                f"{path} exists already", "--yes replaces it; or choose another --output"
            )
        if not _made_by_infopt(path):
            raise UsageError(
                f"{path} was not made by infopt and is not replaced",
                "choose another --output, or remove it yourself",
            )
    elif path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists and is no directory", "choose another --output")


def _made_by_infopt(path: Path) -> bool:
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("made_by") == "infopt"


def cache_directory() -> Path:
    """The user's cache for infopt: $INFOPT_CACHE, else the platform's place."""
    chosen = os.environ.get("INFOPT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("infopt"))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock among processes; it falls with the process that holds it."""
    with disk_faults(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("w")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def fsync(path: Path) -> None:
    """Make a file's bytes, or the renames inside a directory, durable."""
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
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync(path.parent)


@contextmanager
def directory_atomically(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its place on success, and is removed else.

    With `replace` an existing `path` is moved aside first and removed after, so that a crash
    between the two renames leaves both beside each other, and loses nothing. See `check_output`
    for what may be replaced.
    """
    path = path.resolve()  # where it is a link, the directory behind it is meant
    with disk_faults(path):
        check_output(path, replace=replace)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync(file)
            temporary.chmod(0o755)
            _swap_in(temporary, path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(path.parent)


def _swap_in(temporary: Path, path: Path, replace: bool) -> None:
    fsync(temporary)
    old: Path | None = None
    if path.exists() and replace:
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        if old is not None:
            old.rename(path)
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
