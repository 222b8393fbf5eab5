"""Hidden states on disk: the same bits as in memory, and no file that anyone has to remove."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression import offload
from infopt.core.compression.offload import OnDisk, in_memory, offloads
from infopt.core.compression.walk import Walk
from infopt.core.errors import ResourceError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_on_disk_is_what_was_given(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = OnDisk(tmp_path)
    for given in (states, states.transpose(0, 1), states[1:2, ::2], states[:0]):
        kept = keep(given)
        assert torch.equal(kept, given) and kept.dtype == dtype
    first, expected = keep(states), states.clone()
    keep(torch.zeros_like(states))
    states.zero_()
    assert torch.equal(first, expected), "each batch has a place of its own"
    assert list(tmp_path.iterdir()) == [], "its name is gone at once"


def test_it_is_mapped_not_held(tmp_path: Path) -> None:
    kept = OnDisk(tmp_path)(torch.ones(1 << 20))
    address = kept.data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    for line in maps.read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            assert "states-" in line and "(deleted)" in line
            assert line.split()[1].endswith("s"), "shared: no part of the process's own data"
            return
    raise AssertionError("the tensor lies nowhere")


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        plain(path, bytes(data)[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="no space left"):
        OnDisk(tmp_path)(torch.ones(64))
    assert list(tmp_path.iterdir()) == []


def test_it_is_chosen_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(memory_available_bytes=1000)
    monkeypatch.setattr(offload, "probe", lambda: free)
    assert [offloads("auto", nbytes) for nbytes in (0, 250, 251)] == [False, False, True]
    assert offloads("disk", 1) and not offloads("memory", 10**9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_walk_computes_the_same_bits(
    make_model: Callable[[str], Artifact], tmp_path: Path, family: str
) -> None:
    artifact = make_model(family)
    tokens = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "states"
    folder.mkdir()

    def walk(store: Callable[[Tensor], Tensor]) -> Walk:
        batches = (tokens[:2], tokens[2:4], tokens[4:])
        return Walk(artifact, tokens[:1, :8], batches, torch.float32, CPU, store=store)

    held, mapped = walk(in_memory), walk(OnDisk(folder))
    for each in (held, mapped):
        each.start()
    for _ in held.names:
        for each in (held, mapped):
            each.load()
            each.advance()
        assert list(folder.iterdir()) == []
        for one, other in zip(held.hidden, mapped.hidden, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(held.probe_logits(), mapped.probe_logits())
    again = walk(OnDisk(folder))
    again.start()
    again.skip_to(1, iter(held.hidden))
    assert all(torch.equal(a, b) for a, b in zip(again.hidden, held.hidden, strict=True))
