"""Writing so that a crash, a full disk or a kill leaves the old state or the new, never half."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from infopt.core.errors import ResourceError, UsageError

MANIFEST = "manifest.json"
"""Lists the files of a directory that infopt made; only such a directory is ever replaced."""
_CHUNK = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_BROKEN = frozenset({errno.EIO, errno.EROFS})
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOTEMPTY,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENXIO,
        errno.ENOLCK,
    }
)
# Where the names of a process's own open files lie.
_DESCRIPTORS = frozenset({"/dev", "/dev/fd", "/proc/self/fd"})


@contextmanager
def disk_faults(path: Path, told: frozenset[int] = _FULL | _BROKEN | _REFUSED) -> Iterator[None]:
    """Turn a full or failing disk, or a refused permission, into one line about `path`.

    Of the system's errors only those in `told` are turned; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in told:
            raise
        if error.errno in _FULL:
            raise ResourceError(
                f"no space left on the disk while writing {path}",
                "nothing was changed; free some space or choose another --output",
            ) from error
        if error.errno == errno.EIO:
            raise ResourceError(
                f"a disk failed while writing {path}: {error.strerror}",
                "nothing was changed; see the system's log",
            ) from error
        raise ResourceError(f"cannot write {path}: {error.strerror}") from error


def require_disk(output: Path, needed: float, doing: str) -> None:
    """Raise ResourceError where the disk that will hold `output` has not `needed` bytes free.

    `doing` names the work, such as 'quantizing tiny'.
    """
    folder = next(p for p in output.parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{doing} needs {needed / 2**20:.0f} MiB of disk, {folder} has {free / 2**20:.0f}",
            "free some space or choose another --output",
        )


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
    """Write a whole file beside its place, then rename it there; a link stays, its target is meant.

    A pipe or device gets the bytes as they are. Raises UsageError for a directory.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_faults(path):
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            raise UsageError(f"cannot write {path}: it is a directory", "name a file")
        if not stat.S_ISREG(mode) or str(path.parent) in _DESCRIPTORS:
            with path.open("ab") as stream:
                stream.write(data)
            return
        _replace_file(Path(os.path.realpath(path)), data)


def require_writable(path: Path) -> None:
    """Raise UsageError or ResourceError where no file can come to be at `path`; leaves nothing.

    For work whose file comes after minutes: what can be known beforehand is told beforehand.
    """
    with disk_faults(path):
        if stat.S_ISDIR(_mode(path)):
            raise UsageError(f"cannot write {path}: it is a directory", "name a file")
        folder = next(p for p in Path(os.path.realpath(path)).parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {folder}: {error.strerror}") from error


def _mode(path: Path) -> int:
    """What lies at `path`, links followed; a regular file where nothing does."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return stat.S_IFREG


def _replace_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def directory_atomically(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its place on success, and is removed else.

    With `replace` an existing `path` is moved aside first and removed after; what a killed process
    left of either is put right by the next. See `check_output` for what may be replaced. Raises
    UsageError if another process is writing `path`.
    """
    path = Path(os.path.realpath(path))  # where it is a link, the directory behind it is meant
    with disk_faults(path):
        check_output(path, replace=replace)
    with _sole_writer(path):
        temporary = _sibling(path, "tmp")
        with disk_faults(path):
            _put_right(path)
            check_output(path, replace=replace)  # again: what was put right may be in the way
            temporary.mkdir()
        try:
            # The caller reads as well as writes: only what must be our disk's fault is called so.
            with disk_faults(path, _FULL | _BROKEN):
                yield temporary
            with disk_faults(path):
                for file in temporary.rglob("*"):
                    if file.is_file():
                        fsync(file)
                _swap_in(temporary, path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.infopt.{kind}")


@contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Hold the name `path` against other writers; the lock falls with the process that holds it."""
    file = _sibling(path, "lock")
    while True:
        with disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("w")
        with stream:
            try:
                with disk_faults(file):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another infopt is writing {path}",
                    "wait for it, or choose another --output",
                ) from None
            if not _still_named(file, stream.fileno()):
                continue  # the one before us removed the file as we opened it
            try:
                yield
            finally:
                with suppress(OSError):
                    file.unlink()
            return


def _still_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _put_right(path: Path) -> None:
    """Undo what a killed writer of `path` left; with the lock held, none of it has an owner."""
    old, temporary = _sibling(path, "old"), _sibling(path, "tmp")
    if old.is_dir() and not path.exists():
        old.rename(path)
    for left in (old, temporary):
        if left.is_dir():
            shutil.rmtree(left)


def _swap_in(temporary: Path, path: Path, replace: bool) -> None:
    fsync(temporary)
    old: Path | None = None
    if path.exists() and replace:
        old = _sibling(path, "old")
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        if old is not None:
            old.rename(path)
        raise
    fsync(path.parent)
    if old is not None:
        # The work is done; what cannot be removed now, the next writer removes.
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
