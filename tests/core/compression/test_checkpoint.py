from pathlib import Path

import pytest
import torch

from infopt.core.compression import checkpoint as room
from infopt.core.compression.checkpoint import committing, open_checkpoint
from infopt.core.errors import ResourceError, ResumeError, UsageError
from infopt.core.reports.quantize import LayerError

IDENTITY = {"model": "a", "setting bits": "4"}


def row(name: str) -> LayerError:
    return LayerError(name=name, error=0.1, rtn_error=0.2, bits=4, group_size=32, damp=0.01)


def begin(output: Path, blocks: int) -> None:
    with open_checkpoint(output, IDENTITY, LayerError, resume=False, replace=False) as checkpoint:
        for index in range(blocks):
            hidden = [torch.full((2, 3), float(index)), torch.zeros(1, 3)]
            checkpoint.commit({f"layer{index}.x": torch.arange(4)}, [row(f"layer{index}")], hidden)


def test_finished_blocks_come_back(tmp_path: Path) -> None:
    begin(tmp_path / "out", 3)
    with open_checkpoint(
        tmp_path / "out", IDENTITY, LayerError, resume=True, replace=False
    ) as checkpoint:
        assert checkpoint.finished == 3
        assert [r.name for r in checkpoint.rows] == ["layer0", "layer1", "layer2"]
        assert torch.equal(checkpoint.tensor("layer1.x"), torch.arange(4))
        hidden = list(checkpoint.hidden())
        assert [tuple(part.shape) for part in hidden] == [(2, 3), (1, 3)]
        assert float(hidden[0].mean()) == 2.0, "only the newest is kept"
        assert len(list(checkpoint.folder.glob("hidden-*"))) == 2
        checkpoint.discard()
    assert list(tmp_path.iterdir()) == []


def test_work_without_a_finished_block_leaves_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "out", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_before_the_pointer_moves_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infopt.core.compression import checkpoint as module

    begin(tmp_path / "out", 1)
    plain = module.write_atomically

    def failing(path: Path, content: str | bytes) -> None:
        if path.name == "CURRENT":
            raise OSError("the power went")
        plain(path, content)

    monkeypatch.setattr(module, "write_atomically", failing)
    with (
        pytest.raises(OSError, match="power"),
        open_checkpoint(
            tmp_path / "out", IDENTITY, LayerError, resume=True, replace=False
        ) as checkpoint,
    ):
        checkpoint.commit({"layer1.x": torch.ones(1)}, [row("layer1")], [torch.ones(1, 3)])
    monkeypatch.undo()
    with open_checkpoint(
        tmp_path / "out", IDENTITY, LayerError, resume=True, replace=False
    ) as checkpoint:
        assert checkpoint.finished == 1 and len(checkpoint.rows) == 1
        assert [tuple(part.shape) for part in checkpoint.hidden()] == [(2, 3), (1, 3)]


def test_what_differs_is_named(tmp_path: Path) -> None:
    begin(tmp_path / "out", 1)
    for changed in ({"model": "b"}, {"setting bits": "3"}, {"new": "key"}):
        with (
            pytest.raises(ResumeError, match=next(iter(changed))),
            open_checkpoint(
                tmp_path / "out", IDENTITY | changed, LayerError, resume=True, replace=True
            ),
        ):
            pass


def test_the_lock_keeps_a_second_away(tmp_path: Path) -> None:
    with (
        open_checkpoint(tmp_path / "out", IDENTITY, LayerError, resume=False, replace=False),
        pytest.raises(UsageError, match="another infopt"),
        open_checkpoint(tmp_path / "out", IDENTITY, LayerError, resume=False, replace=True),
    ):
        pass


@pytest.mark.parametrize("victim", ["CURRENT", "block-0000.json", "block-0000.safetensors"])
def test_damage_is_told(tmp_path: Path, victim: str) -> None:
    begin(tmp_path / "out", 1)
    file = tmp_path / ".out.infopt-partial" / victim
    file.write_bytes(file.read_bytes()[:-3])
    with (
        pytest.raises(ResumeError, match="damaged"),
        open_checkpoint(tmp_path / "out", IDENTITY, LayerError, resume=True, replace=False),
    ):
        pass


def test_discarding_asks_for_replace(tmp_path: Path) -> None:
    begin(tmp_path / "out", 2)
    with (
        pytest.raises(ResumeError, match="unfinished"),
        open_checkpoint(tmp_path / "out", IDENTITY, LayerError, resume=False, replace=False),
    ):
        pass
    with open_checkpoint(
        tmp_path / "out", IDENTITY, LayerError, resume=False, replace=True
    ) as checkpoint:
        assert checkpoint.finished == 0
        assert sorted(path.name for path in checkpoint.folder.iterdir()) == [
            "identity.json",
            "lock",
        ]


def test_staging_clears_what_a_kill_left(tmp_path: Path) -> None:
    with open_checkpoint(
        tmp_path / "out", IDENTITY, LayerError, resume=False, replace=False
    ) as checkpoint:
        (checkpoint.folder / "artifact-new").mkdir()
        (checkpoint.folder / ".artifact-new.lock").touch()
        assert not checkpoint.staging().exists()
        assert not list(checkpoint.folder.glob("*artifact*"))
        checkpoint.discard()


@pytest.mark.parametrize("beside", [True, False])
def test_commits_beside_the_work_are_what_was_given_at_the_time(
    tmp_path: Path, beside: bool
) -> None:
    with open_checkpoint(tmp_path / "out", {}, LayerError, resume=False, replace=False) as it:
        weight, hidden = torch.zeros(4), torch.zeros(1, 3)
        with committing(it, beside=beside) as commit:
            for index in range(3):
                commit({f"layer{index}.x": weight.clone()}, [row(f"layer{index}")], [hidden])
                weight += 1
                hidden += 1  # the next block may write into its inputs
        assert it.finished == 3
        assert [float(it.tensor(f"layer{index}.x")[0]) for index in range(3)] == [0, 1, 2]
        assert [float(part[0, 0]) for part in it.hidden()] == [2]
        assert [each.name for each in it.rows] == ["layer0", "layer1", "layer2"]


def test_a_commit_beside_the_work_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("no space left on the disk")

    with open_checkpoint(tmp_path / "out", {}, LayerError, resume=False, replace=False) as it:
        monkeypatch.setattr(room, "write_atomically", full)
        with (
            pytest.raises(ResourceError, match="no space left"),
            committing(it, beside=True) as commit,
        ):
            commit({"layer0.x": torch.zeros(1)}, [row("layer0")], [])
        assert it.finished == 0
