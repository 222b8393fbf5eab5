"""Packed weights in a file: as they were, or refused."""

import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from infopt.kernels.cpu.image import KEY, ImageError, read_image, write_image

TENSORS = [
    torch.arange(12, dtype=torch.int16).view(3, 4),
    torch.randn(33, dtype=torch.float32),
    torch.randn(5, 7).to(torch.bfloat16),
    torch.zeros(0, dtype=torch.int8),
    torch.randn(64).to(torch.float16),
    torch.randint(0, 255, (100_003,), dtype=torch.uint8),
]


def anything(about: dict[str, Any]) -> None:
    pass


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "x.packed"
    assert write_image(path, {"a": [1]}, TENSORS) == path.stat().st_size
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_written_is_read(file: Path, threads: int) -> None:
    image = read_image(file, anything, threads)
    assert image.about == {"a": [1]}
    for ours, theirs in zip(image.tensors, TENSORS, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert ours.data_ptr() % 64 == 0


def test_it_is_a_safetensors_file(file: Path) -> None:
    with safe_open(file, framework="pt") as stream:
        assert list(stream.keys()) == ["bytes"] and KEY in stream.metadata()


def test_what_it_is_of_is_asked_first(file: Path) -> None:
    def refuse(about: dict[str, Any]) -> None:
        raise ImageError(f"not {about['a']}")

    with pytest.raises(ImageError, match=r"not \[1\]"):
        read_image(file, refuse, 1)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "x", anything, 1)


@pytest.mark.parametrize("place", [5, 300, -1, -50_000])
def test_damage_is_seen(file: Path, place: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ImageError):
        read_image(file, anything, 1)


@pytest.mark.parametrize("length", [0, 7, 8, 4000, 90_000])
def test_what_is_cut_short_is_seen(file: Path, length: int) -> None:
    os.truncate(file, length)
    with pytest.raises(ImageError):
        read_image(file, anything, 1)


@pytest.mark.parametrize(
    "told",
    [
        [],
        {"about": {}},
        {"about": [], "tensors": [], "sum": 0},
        {"about": {}, "tensors": [["int64", [1], 0]], "sum": 0},
        {"about": {}, "tensors": [["int8", [65], 0]], "sum": 0},
        {"about": {}, "tensors": [["int8", [1], 1]], "sum": 0},
        {"about": {}, "tensors": [["int8", [-1], 0]], "sum": 0},
        {"about": {}, "tensors": [["int8", [True], 0]], "sum": 0},
        {"about": {}, "tensors": [["int8", ["1"], 0]], "sum": 0},
        {"about": {}, "tensors": [["int8", [1]]], "sum": 0},
        {"about": {}, "tensors": [], "sum": "0"},
    ],
)
def test_a_foreign_table_is_refused(tmp_path: Path, told: Any) -> None:
    header = json.dumps(
        {
            "__metadata__": {KEY: json.dumps(told)},
            "bytes": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
        }
    ).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ImageError):
        read_image(tmp_path / "x", anything, 1)


def test_any_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGUF" * 100)
    with pytest.raises(ImageError, match="no file of packed weights"):
        read_image(tmp_path / "x", anything, 1)


def test_writers_and_readers_at_once(file: Path) -> None:
    faults: list[Exception] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                write_image(file, {"a": [number]}, TENSORS)
                assert torch.equal(read_image(file, anything, 1).tensors[5], TENSORS[5])
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert list(file.parent.iterdir()) == [file]


def test_what_killed_writers_left_is_removed(file: Path) -> None:
    old, fresh = file.parent / ".x.packed.1.tmp", file.parent / ".x.packed.2.tmp"
    old.touch()
    fresh.touch()
    os.utime(old, (0, 0))
    write_image(file, {}, TENSORS)
    assert not old.exists() and fresh.exists()
