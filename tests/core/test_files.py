"""A failure leaves the old state or the new one, never half."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infopt.core.errors import InfoptError, ResourceError, UsageError
from infopt.core.files import (
    MANIFEST,
    directory_atomically,
    require_writable,
    sha256,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.json"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert names(path.parent) == ["report.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "report.json"
    for link in (tmp_path / "one", tmp_path / "two"):
        link.symlink_to(target)  # the first to nothing yet
        write_atomically(link, link.name)
        assert link.is_symlink() and target.read_text() == link.name
    assert names(target.parent) == ["report.json"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ResourceError, match=r"cannot write .*round"):
        write_atomically(tmp_path / "round", "x")


def test_a_pipe_gets_the_bytes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomically(pipe, "bytes")
    reader.join(10)
    assert read == [b"bytes"] and pipe.is_fifo()


def test_devices_stay_devices(tmp_path: Path) -> None:
    """On a terminal's file system nothing can be renamed: a failure costs no device of ours."""
    ours, theirs = os.openpty()
    device, link = Path(os.ttyname(theirs)), tmp_path / "device"
    link.symlink_to(device)
    for path in (device, link):
        write_atomically(path, "line")
        assert path.is_char_device() and os.read(ours, 100) == b"line"
    assert link.is_symlink()
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("stdout", ["pipe", "file"])
def test_standard_output_by_its_name(tmp_path: Path, stdout: str) -> None:
    code = """
from pathlib import Path
from infopt.core.files import write_atomically
print("before", flush=True)
write_atomically(Path("/proc/self/fd/1"), "report")  # what /dev/stdout is
"""
    file = tmp_path / "out"
    with file.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE if stdout == "pipe" else stream,
            check=True,
        )
    assert (done.stdout or file.read_bytes()) == b"before\nreport"


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        write_atomically(tmp_path, "x")
    assert names(tmp_path) == []


def test_where_no_file_can_be_is_told_beforehand(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for path in (file, tmp_path / "new", tmp_path / "new" / "folder" / "file"):
        require_writable(path)
    with pytest.raises(UsageError, match="is a directory"):
        require_writable(tmp_path)
    with pytest.raises(ResourceError, match="Not a directory"):
        require_writable(file / "inside")
    with pytest.raises(ResourceError, match="cannot write /proc/none/file: /proc: "):
        require_writable(Path("/proc/none/file"))
    assert names(tmp_path) == ["file"] and file.read_text() == "kept"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_modes_are_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        write_atomically(tmp_path / "file", "x")
        with directory_atomically(tmp_path / "model"):
            pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with directory_atomically(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["config.json"]


def test_an_interrupted_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), directory_atomically(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_existing_directory_is_kept_unless_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(InfoptError), directory_atomically(target) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["old"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.ENOENT])
def test_a_fault_of_the_source_is_not_the_outputs(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError) as caught, directory_atomically(tmp_path / "model"):
        raise OSError(number, os.strerror(number), "source")
    assert caught.value.filename == "source" and names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "cannot write .*model: Read-only"),
        (errno.EIO, "a disk failed while writing .*model: Input/output error"),
    ],
)
def test_a_disk_that_fails_in_the_body_is_told(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(ResourceError, match=words), directory_atomically(tmp_path / "model"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from infopt.core import files

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "between":  # the second rename of the swap
    plain, calls = Path.rename, []
    Path.rename = lambda *a: (calls.append(a), die() if len(calls) == 2 else plain(*a))
elif sys.argv[2] == "after":
    files.shutil.rmtree = die
with files.directory_atomically(Path(sys.argv[1]), replace=True) as folder:
    (folder / "manifest.json").write_text('{"made_by": "infopt", "is": "new"}')
    if sys.argv[2] == "body":
        die()
"""


def kill(target: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when])
    assert done.returncode == -signal.SIGKILL


def make(target: Path, word: str, *, replace: bool = False) -> None:
    with directory_atomically(target, replace=replace) as folder:
        (folder / MANIFEST).write_text(f'{{"made_by": "infopt", "is": "{word}"}}')


@pytest.mark.parametrize(
    ("when", "kept"), [("body", '"old"'), ("between", '"old"'), ("after", '"new"')]
)
def test_what_a_kill_left_is_put_right_by_the_next(tmp_path: Path, when: str, kept: str) -> None:
    target = tmp_path / "model"
    make(target, "old")
    kill(target, when)
    assert len(names(tmp_path)) > 1
    other = tmp_path / ".model.tmp"
    other.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        make(target, "newer")
    assert kept in (target / MANIFEST).read_text()
    make(target, "newer", replace=True)
    assert names(tmp_path) == [".model.tmp", "model"]
    assert '"newer"' in (target / MANIFEST).read_text()


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with directory_atomically(target) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(UsageError, match="another infopt is writing"):
            make(target, "new")
        make(tmp_path / "other", "new")
    assert names(target) == ["file"]
    assert names(tmp_path) == ["model", "other"]


def test_an_old_directory_that_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    make(target, "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", _refuse)
        make(target, "new", replace=True)
    assert '"new"' in (target / MANIFEST).read_text()
    make(target, "newer", replace=True)
    assert names(tmp_path) == ["model"]


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
