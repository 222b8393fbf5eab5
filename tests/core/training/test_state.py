import json
from pathlib import Path

import pytest
import torch

from infopt.core.errors import ResumeError
from infopt.core.training import state as module
from infopt.core.training.state import TrainingState, load_state, save_state

IDENTITY = {"model": "a", "seed": "0"}


def state(step: int) -> TrainingState:
    return TrainingState(step, {"a": torch.full((3,), float(step))}, [0.5] * step)


def test_a_state_comes_back_and_the_one_before_is_gone(tmp_path: Path) -> None:
    assert load_state(tmp_path / "new", IDENTITY) is None
    for step in (2, 4):
        save_state(tmp_path, IDENTITY, state(step))
    found = load_state(tmp_path, IDENTITY)
    assert found is not None
    assert (found.step, found.losses) == (4, [0.5] * 4)
    assert torch.equal(found.tensors["a"], torch.full((3,), 4.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "CURRENT",
        "state-000004.safetensors",
    ]


def test_a_kill_while_writing_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, IDENTITY, state(2))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_atomically", killed)
        save_state(tmp_path, IDENTITY, state(4))
    found = load_state(tmp_path, IDENTITY)
    assert found is not None and found.step == 2


def test_other_work_or_damage_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, IDENTITY, state(2))
    with pytest.raises(ResumeError, match="another seed"):
        load_state(tmp_path, IDENTITY | {"seed": "1"})
    file = tmp_path / json.loads((tmp_path / "CURRENT").read_text())["file"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ResumeError, match="damaged"):
        load_state(tmp_path, IDENTITY)
    (tmp_path / "CURRENT").write_text("[]")
    with pytest.raises(ResumeError, match="damaged"):
        load_state(tmp_path, IDENTITY)
