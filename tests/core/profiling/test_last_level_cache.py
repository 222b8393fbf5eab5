"""Cache sizes as Linux tells them."""

from pathlib import Path

import pytest

from infopt.core.profiling.last_level_cache import last_level_cache, parse_size


def cache(root: Path, cpu: int, index: int, level: int, size: str, sharers: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", sharers)):
        (folder / name).write_text(text + "\n")


def test_each_shared_cache_counts_once(tmp_path: Path) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        cache(tmp_path, cpu, 3, 3, "16384K", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache(tmp_path) == 2 * 16 * 2**20


def test_unknown_is_none(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    cache(tmp_path, 0, 0, 3, "large", "0")
    assert last_level_cache(tmp_path) is None


def test_sizes() -> None:
    assert parse_size("32768K\n") == 32 * 2**20
    assert parse_size("1M") == 2**20
    assert parse_size("512") == 512
    with pytest.raises(ValueError):
        parse_size("large")
