"""Unfinished work beside its output: an interrupted run continues at its last finished block.

The folder `.NAME.infopt-partial` holds each finished block's tensors and report rows, the hidden
states that go into the next block, and CURRENT: how many blocks are finished, with the SHA-256 of
every file that counts. CURRENT is replaced atomically and last, so a kill at any moment leaves the
state before a block or after it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from infopt.core.errors import ResumeError, UsageError
from infopt.core.files import disk_faults, sha256, write_atomically
from infopt.core.reports.schema import Record

_CURRENT = "CURRENT"
_IDENTITY = "identity.json"
_STAGES = "STAGES"
_LOCK = "lock"


Row = TypeVar("Row", bound=Record)
"""What is reported of a layer."""
Commit = Callable[[Mapping[str, Tensor], Sequence[Row], Sequence[Tensor]], None]
"""As `Checkpoint.commit`."""


class Checkpoint(Generic[Row]):
    """The finished blocks of one compression, their tensors and their rows of the report."""

    def __init__(self, folder: Path, kind: type[Row]) -> None:
        self.folder = folder
        self._kind = kind
        self.finished = 0
        self._digests: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self.rows: list[Row] = []

    def commit(
        self, tensors: Mapping[str, Tensor], rows: Sequence[Row], hidden: Sequence[Tensor]
    ) -> None:
        """Make one more finished block durable; `hidden` are the inputs of the next."""
        self._write_block(_serialized(tensors, rows, hidden))

    def _write_block(self, block: "_Block[Row]") -> None:
        old = [name for name in self._digests if name.startswith("hidden-")]
        kept = {name: digest for name, digest in self._digests.items() if name not in old}
        content = {_block_file(self.finished): block.tensors}
        rows_json = json.dumps([row.model_dump(mode="json") for row in block.rows])
        content[_rows_file(self.finished)] = rows_json.encode()
        for name, data in content.items():
            kept[name] = self._write(name, data)
        for index, part in enumerate(block.hidden):
            name = _hidden_file(self.finished + 1, index)
            kept[name] = self._write(name, part)
        state = {"finished": self.finished + 1, "files": kept}
        write_atomically(self.folder / _CURRENT, json.dumps(state))
        self._files.update(dict.fromkeys(block.names, self.folder / _block_file(self.finished)))
        self.rows.extend(block.rows)
        self._digests, self.finished = kept, self.finished + 1
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The tensors of all finished blocks."""
        return sorted(self._files)

    def stage(self, name: str) -> Path:
        """A place for work before the first block, kept like finished blocks; the path is new or
        was filled by an earlier try, atomically."""
        (self.folder / _STAGES).touch()
        return self.folder / f"stage-{name}"

    def restart(self, *stages: str) -> None:
        """Forget the finished blocks, and the stages named."""
        (self.folder / _CURRENT).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name.startswith(("block-", "hidden-")):
                path.unlink()
        for name in stages:
            for path in self.folder.glob(f"*stage-{name}*"):
                # Aside first: what is half removed must not be taken for the whole stage.
                gone = path.rename(self.folder / f"gone-{path.name.lstrip('.')}")
                shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        self.finished, self._digests, self._files, self.rows = 0, {}, {}, []

    def tensor(self, name: str) -> Tensor:
        """A tensor of a finished block."""
        with safe_open(self._files[name], framework="pt") as stream:
            found: Tensor = stream.get_tensor(name)
            return found

    def hidden(self) -> Iterator[Tensor]:
        """The inputs of the block after the last finished one, one tensor a batch, as asked for."""
        for name in sorted(name for name in self._digests if name.startswith("hidden-")):
            yield load((self.folder / name).read_bytes())["hidden"]

    def read(self) -> None:
        """Take up what is there; raises ResumeError if a file is missing or changed."""
        if not (self.folder / _CURRENT).exists():
            return
        try:
            state = json.loads((self.folder / _CURRENT).read_text())
            for name, digest in state["files"].items():
                if sha256(self.folder / name) != digest:
                    raise _damaged(self.folder / name)
            for index in range(state["finished"]):
                rows = json.loads((self.folder / _rows_file(index)).read_text())
                self.rows.extend(self._kind.model_validate(row) for row in rows)
                with safe_open(self.folder / _block_file(index), framework="pt") as stream:
                    names = list(stream.keys())
                self._files.update(dict.fromkeys(names, self.folder / _block_file(index)))
            self.finished, self._digests = state["finished"], state["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.folder) from error

    def staging(self) -> Path:
        """Where the artifact is built; what an earlier try left there is removed."""
        for path in self.folder.glob("*artifact*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()  # a lock that a kill left
        return self.folder / "artifact"

    def clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.name == _LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def discard(self) -> None:
        """The work is done, or cannot be: remove the folder."""
        shutil.rmtree(self.folder)

    def _write(self, name: str, data: bytes) -> str:
        write_atomically(self.folder / name, data)
        return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class _Block(Generic[Row]):
    """A finished block as it will be written."""

    names: tuple[str, ...]
    tensors: bytes
    rows: Sequence[Row]
    hidden: Iterable[bytes]


def _serialized(
    tensors: Mapping[str, Tensor], rows: Sequence[Row], hidden: Iterable[Tensor]
) -> _Block[Row]:
    """`hidden` is serialized as it is written: one tensor's bytes are in memory at a time."""
    parts = (save({"hidden": part.contiguous()}) for part in hidden)
    return _Block(tuple(tensors), save(dict(tensors)), rows, parts)


@contextmanager
def committing(checkpoint: Checkpoint[Row], *, beside: bool) -> Iterator[Commit[Row]]:
    """Commits, `beside` the work that goes on: the disk takes none of its time.

    Each is durable before the next begins, and all are when the block is left; a fault of one is
    raised by the next, or there. What is committed may be changed at once. Until it is written it
    is in memory as a whole: not for what does not fit there.
    """
    if not beside:
        yield checkpoint.commit
        return
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as thread:
        pending: list[Future[None]] = []

        def commit(
            tensors: Mapping[str, Tensor], rows: Sequence[Row], hidden: Sequence[Tensor]
        ) -> None:
            block = _serialized(tensors, rows, hidden)
            whole = replace(block, hidden=list(block.hidden))
            while pending:
                pending.pop().result()
            pending.append(thread.submit(checkpoint._write_block, whole))

        yield commit
        while pending:
            pending.pop().result()


@contextmanager
def open_checkpoint(
    output: Path, identity: Mapping[str, str], kind: type[Row], *, resume: bool, replace: bool
) -> Iterator[Checkpoint[Row]]:
    """The work towards `output`, new or taken up, held against other processes.

    Raises ResumeError where unfinished work is there and `resume` is not asked for (`replace`
    discards it), or where it was begun with another identity; UsageError if a process holds it.
    """
    folder = output.parent / f".{output.name}.infopt-partial"
    with _held(folder):
        checkpoint = Checkpoint(folder, kind)
        unfinished = _unfinished(folder)
        if unfinished and resume:
            _require_same(folder, identity)
            checkpoint.read()
        elif unfinished and not replace:
            raise ResumeError(
                f"{folder} holds unfinished work towards {output}",
                "--resume continues it, --yes discards it",
            )
        else:
            checkpoint.clear()
            write_atomically(folder / _IDENTITY, json.dumps(dict(identity), indent=1))
        try:
            yield checkpoint
        finally:
            if not _unfinished(folder):
                # No block was finished: there is nothing to come back to.
                shutil.rmtree(folder, ignore_errors=True)


def _unfinished(folder: Path) -> bool:
    return (folder / _CURRENT).exists() or (folder / _STAGES).exists()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it falls with the process, however that ends."""
    while True:
        with disk_faults(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / _LOCK).open("w")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another infopt is at work on {folder}",
                    "wait for it, or choose another --output",
                ) from None
            if not _still_named(folder / _LOCK, stream.fileno()):
                continue  # the one before us removed the folder as we opened it
            yield
            return


def _still_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _require_same(folder: Path, identity: Mapping[str, str]) -> None:
    try:
        begun: dict[str, Any] = json.loads((folder / _IDENTITY).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder / _IDENTITY) from error
    for key in [*identity, *begun]:
        if identity.get(key) != begun.get(key):
            raise ResumeError(
                f"the unfinished work in {folder} was begun with another {key}: "
                f"{_short(begun.get(key))}, now {_short(identity.get(key))}",
                "repeat the request as it was, or discard the work with --yes and without --resume",
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _damaged(path: Path) -> ResumeError:
    return ResumeError(
        f"the unfinished work cannot be continued: {path} is missing or damaged",
        "--yes without --resume discards it and begins anew",
    )


def _block_file(index: int) -> str:
    return f"block-{index:04d}.safetensors"


def _rows_file(index: int) -> str:
    return f"block-{index:04d}.json"


def _hidden_file(position: int, batch: int) -> str:
    return f"hidden-{position:04d}-{batch:05d}.safetensors"
