"""A failure leaves the old state or the new one, never half."""

import errno
import os
from pathlib import Path

import pytest

from infopt.core.errors import InfoptError, ResourceError
from infopt.core.files import directory_atomically, sha256, write_atomically


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


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
