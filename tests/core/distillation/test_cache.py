"""Kept logits: the same as live ones, whole after a kill, refused when damaged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from infopt.core.distillation.cache import TeacherCache, cache_bytes, fill_cache
from infopt.core.errors import ResumeError
from infopt.core.training.losses import top_k

WINDOWS = torch.randint(0, 50, (70, 9), generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(50, 50, generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


class Teacher:
    """Tells the next token by the last one; says how often it was asked, fails at will."""

    def __init__(self, fails_after: int = 1000) -> None:
        self.asked, self.fails_after = 0, fails_after

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.asked == self.fails_after:
            raise KeyboardInterrupt
        self.asked += 1
        return TABLE[tokens]


def test_what_is_kept_is_the_whole_distribution_s_top(tmp_path: Path) -> None:
    fill_cache(tmp_path / "c", WINDOWS, Teacher(), k=5, temperature=2.0)
    cache = TeacherCache(tmp_path / "c", WINDOWS)
    for window in (WINDOWS[0], WINDOWS[33], WINDOWS[69]):
        found, wanted = cache.rows(window, CPU), top_k(TABLE[window[:-1]], 5, 2.0)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.log_p, wanted.log_p)
    with pytest.raises(KeyError):
        cache.rows(WINDOWS[0] + 1, CPU)
    size = sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    assert 0 < size - cache_bytes(70, 9, 5) < 3 * 400


def test_a_killed_pass_goes_on_at_its_next_part(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "c", WINDOWS, Teacher(fails_after=40), k=5, temperature=1.0)
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["part-00000.safetensors"]
    rest, seen = Teacher(), []
    fill_cache(tmp_path / "c", WINDOWS, rest, k=5, temperature=1.0, progress=seen.append)
    assert rest.asked == 38 and {p.resumed for p in seen} == {32}
    fill_cache(tmp_path / "whole", WINDOWS, Teacher(), k=5, temperature=1.0)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    fill_cache(tmp_path / "c", WINDOWS, Teacher(), k=5, temperature=1.0)
    file = tmp_path / "c" / "part-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    cache = TeacherCache(tmp_path / "c", WINDOWS)
    cache.rows(WINDOWS[0], CPU)
    with pytest.raises(ResumeError, match="part-00001"):
        cache.rows(WINDOWS[40], CPU)
    file.unlink()
    with pytest.raises(ResumeError, match="part-00001"):
        cache.rows(WINDOWS[40], CPU)
