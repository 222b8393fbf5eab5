"""The tier on disk: what was put is found again, whole, or not at all."""

import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ResourceError, UsageError
from infopt.core.runtime.prefix_disk import PrefixDisk, block_identity
from infopt.core.runtime.prefix_store import PrefixStore

SHAPE = (2, 3)
FILE_BYTES = 8 + 32 + 2 * 3 * 4


def content(value: float) -> torch.Tensor:
    return torch.full(SHAPE, float(value))


def open_disk(folder: Path, blocks: int = 4, identity: bytes = b"one model") -> PrefixDisk:
    return PrefixDisk(
        folder, blocks * FILE_BYTES, identity=identity, shape=SHAPE, dtype=torch.float32
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def value_of(disk: PrefixDisk, digest: bytes) -> float | None:
    found = disk.get(digest)
    if found is None:
        assert digest not in disk
        return None
    assert found.shape == SHAPE and bool((found == found[0, 0]).all())
    return float(found[0, 0])


def test_what_was_put_is_found_by_the_next_engine(tmp_path: Path) -> None:
    disk = open_disk(tmp_path / "kv")
    disk.put(b"a", content(1.5))
    assert value_of(disk, b"a") == 1.5 and b"b" not in disk and disk.get(b"b") is None
    again = open_disk(tmp_path / "kv")
    assert b"a" in again and value_of(again, b"a") == 1.5
    assert again.nbytes == disk.nbytes == FILE_BYTES == files(tmp_path / "kv")[0].stat().st_size


def test_what_another_model_computed_is_not_found_but_counts(tmp_path: Path) -> None:
    open_disk(tmp_path, identity=b"one model").put(b"a", content(1))
    other = open_disk(tmp_path, blocks=2, identity=b"another")
    assert b"a" not in other and other.get(b"a") is None and other.nbytes == FILE_BYTES
    other.put(b"a", content(2))
    other.put(b"b", content(3))
    assert value_of(other, b"a") == 2 and value_of(other, b"b") == 3
    assert b"a" not in open_disk(tmp_path, identity=b"one model"), "the oldest went, whosever"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    shape = (3, 4, 2, 1, 6)
    held = torch.randint(256, (*shape[:-1], 6 * dtype.itemsize), dtype=torch.uint8)
    disk = PrefixDisk(tmp_path, 10**6, identity=b"", shape=shape, dtype=dtype)
    disk.put(b"a", held.view(dtype))
    found = disk.get(b"a")
    assert found is not None and found.dtype == dtype and found.shape == shape
    assert torch.equal(found.view(torch.uint8), held)


def test_the_least_recently_used_goes_first_across_engines(tmp_path: Path) -> None:
    disk = open_disk(tmp_path, blocks=3)
    for name in (b"a", b"b", b"c"):
        disk.put(name, content(0))
    disk.get(b"a")
    disk = open_disk(tmp_path, blocks=3)
    disk.put(b"b", content(0))  # there already: only used again
    disk.put(b"d", content(0))
    assert b"c" not in disk and all(name in disk for name in (b"a", b"b", b"d"))
    assert disk.nbytes == 3 * FILE_BYTES and len(files(tmp_path)) == 3
    assert open_disk(tmp_path, blocks=1).nbytes == FILE_BYTES
    assert len(files(tmp_path)) == 1


def damages() -> list[Any]:
    def cut(file: Path) -> None:
        os.truncate(file, FILE_BYTES - 1)

    def empty(file: Path) -> None:
        os.truncate(file, 0)

    def longer(file: Path) -> None:
        file.write_bytes(file.read_bytes() + b"\0")

    def flipped(at: int) -> Any:
        def flip(file: Path) -> None:
            data = bytearray(file.read_bytes())
            data[at] ^= 1
            file.write_bytes(data)

        return flip

    def foreign(file: Path) -> None:
        (other,) = (path for path in files(file.parent) if path != file)
        file.write_bytes(other.read_bytes())

    return [cut, empty, longer, flipped(0), flipped(20), flipped(-1), foreign]


@pytest.mark.parametrize("damage", damages())
@pytest.mark.parametrize("restart", [False, True])
def test_a_damaged_file_is_absent_and_removed(tmp_path: Path, damage: Any, restart: bool) -> None:
    disk = open_disk(tmp_path)
    disk.put(b"a", content(1))
    (file,) = files(tmp_path)
    disk.put(b"b", content(2))
    damage(file)
    if restart:
        disk = open_disk(tmp_path)
    assert b"a" in disk, "nobody has looked yet"
    assert disk.get(b"a") is None and b"a" not in disk and not file.exists()
    assert value_of(disk, b"b") == 2 and disk.nbytes == FILE_BYTES
    disk.put(b"a", content(3))
    assert value_of(disk, b"a") == 3


def test_a_file_that_is_gone_is_written_again(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    disk.put(b"a", content(1))
    files(tmp_path)[0].unlink()
    disk.put(b"a", content(1))
    assert value_of(disk, b"a") == 1
    files(tmp_path)[0].unlink()
    assert b"a" in disk and disk.get(b"a") is None and b"a" not in disk and disk.nbytes == 0


def test_a_folder_that_is_gone_is_an_empty_one(tmp_path: Path) -> None:
    disk = open_disk(tmp_path / "kv")
    disk.put(b"a", content(1))
    files(tmp_path / "kv")[0].unlink()
    (tmp_path / "kv").rmdir()
    disk.put(b"b", content(2))
    assert disk.get(b"a") is None and b"b" not in disk
    assert files(tmp_path) == []


def test_what_cannot_be_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_disk(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("infopt.core.runtime.prefix_disk._stamp", full)
        disk.put(b"a", content(1))
    assert b"a" not in disk and files(tmp_path) == []
    disk.put(b"a", content(1))
    assert value_of(disk, b"a") == 1


def test_what_a_killed_writer_left_is_swept_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    open_disk(folder).put(b"a", content(1))
    kept = files(folder)[0].name
    for name in (f"{kept}.00000000.tmp", f"{kept}.11111111.tmp", "notes.txt", "short.kv"):
        (folder / name).write_bytes(b"something" * 1000)
    long_ago = time.time() - 7200
    for name in (f"{kept}.00000000.tmp", "notes.txt", "short.kv"):
        os.utime(folder / name, (long_ago, long_ago))
    disk = open_disk(folder, blocks=1)
    assert {file.name for file in files(folder)} == {
        kept, f"{kept}.11111111.tmp", "notes.txt", "short.kv"
    }  # fmt: skip
    assert disk.nbytes == FILE_BYTES


def test_two_at_one_folder_find_and_lose_each_others_files(tmp_path: Path) -> None:
    left, right = open_disk(tmp_path, blocks=3), open_disk(tmp_path, blocks=3)
    left.put(b"a", content(1))
    assert b"a" in right and value_of(right, b"a") == 1
    for name in (b"b", b"c", b"d"):
        right.put(name, content(2))
    assert len(files(tmp_path)) == 3
    assert b"a" in left, "it has not heard yet"
    assert left.get(b"a") is None and b"a" not in left
    left.put(b"a", content(1))
    assert left.nbytes == 3 * FILE_BYTES and len(files(tmp_path)) == 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "get", "get", "harm", "remove", "reopen"]),
            st.integers(0, 5),
            st.integers(0, 1),
        ),
        max_size=40,
    )
)
def test_whatever_happens_what_is_found_is_what_was_put(
    events: list[tuple[str, int, int]],
) -> None:
    """Two processes at one folder, of another limit each, and somebody who harms files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disks = [open_disk(folder, blocks=3), open_disk(folder, blocks=2)]
        for count, (kind, number, who) in enumerate(events):
            disk, digest = disks[who], bytes([number])
            held = files(folder)
            match kind:
                case "put":
                    disk.put(digest, content(number))
                    assert disk.nbytes <= disk.limit
                case "get":
                    assert value_of(disk, digest) in (None, number)
                case "harm" if held:
                    file = held[count % len(held)]
                    file.write_bytes(file.read_bytes()[: count * 3] + b"harm")
                case "remove" if held:
                    held[count % len(held)].unlink()
                case "reopen":
                    disks[who] = open_disk(folder, blocks=3 - who)


def test_the_folder_is_private(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b"
    open_disk(made).put(b"a", content(1))
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    open_disk(made)
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o755)
    open_disk(empty)
    assert stat.S_IMODE(empty.stat().st_mode) == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "file").touch()
    with pytest.raises(UsageError, match="others may enter"):
        open_disk(shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755


def test_what_cannot_be_a_folder_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError) as told:
            open_disk(folder)
        assert str(folder) in told.value.message and told.value.hint == (
            "choose another --prefix-disk"
        )
    with pytest.raises(UsageError, match=f"holds no block of {FILE_BYTES} bytes"):
        open_disk(tmp_path / "kv", blocks=0)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match="another user's"):
        open_disk(tmp_path / "kv")


def test_host_memory_sinks_to_disk(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store = PrefixStore(2 * content(0).nbytes, disk)
    for number, name in enumerate((b"a", b"b", b"c")):
        store.put(name, content(number))
    assert b"a" in disk and b"b" not in disk and all(n in store for n in (b"a", b"b", b"c"))
    assert store.wants(b"a") and not store.wants(b"c"), "what is on disk alone may come back up"
    assert [float(found[0, 0]) for n in (b"a", b"b", b"c") if (found := store.get(n)) is not None
            ] == [0, 1, 2]  # fmt: skip
    files(tmp_path)[0].unlink()
    assert store.get(b"a") is None and b"a" not in store


def test_without_host_memory_all_goes_to_disk_once(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    store = PrefixStore(0, disk)
    assert store.wants(b"a")
    store.put(b"a", content(1))
    assert not store.wants(b"a") and b"a" in disk and store.nbytes == len(store) == 0


def test_an_identity_is_of_the_weights_and_of_how_they_are_run(
    tiny_reference: tuple[Artifact, Any], tmp_path: Path
) -> None:
    artifact = tiny_reference[0]
    told = {"shape": SHAPE, "dtype": torch.float32, "computed": "float32"}
    cpu = torch.device("cpu")
    first = block_identity(artifact, cpu, **told)
    # A copy elsewhere is the same model.
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in artifact.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert block_identity(read_artifact(copy), cpu, **told) == first
    others = [
        block_identity(artifact, cpu, **{**told, "shape": (3, 2)}),
        block_identity(artifact, cpu, **{**told, "dtype": torch.int32}),
        block_identity(artifact, cpu, **{**told, "computed": "bfloat16"}),
        block_identity(
            Artifact(**{**vars(artifact), "config": {**artifact.config, "rope_theta": 7.0}}),
            cpu,
            **told,
        ),
    ]
    # One bit of one weight, with size, name and date as they were.
    (weights,) = set(read_artifact(copy).files.values())
    date, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(date.st_atime_ns, date.st_mtime_ns))
    others.append(block_identity(read_artifact(copy), cpu, **told))
    assert len({first, *others}) == 6
