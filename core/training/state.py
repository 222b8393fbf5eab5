"""A training's state on disk: a kill at any moment leaves the one before or the new one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.errors import ResumeError
from infopt.core.files import disk_faults, fsync, sha256, write_atomically

_CURRENT = "CURRENT"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a training stands after `step` steps: all tensors that it goes on from, its losses.

    `details` is whatever else it goes on from, as JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    losses: list[float]
    details: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, identity: Mapping[str, str], state: TrainingState) -> None:
    """Make a state durable in `folder`, in place of the one before; a kill leaves one of the two.

    safetensors and JSON; CURRENT is replaced last and holds the SHA-256 of what it names.
    """
    name = f"state-{state.step:06d}.safetensors"
    file, temporary = folder / name, folder / f".{name}.tmp"
    with disk_faults(file):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.tensors.items()}, temporary)
        fsync(temporary)
        temporary.replace(file)
        fsync(folder)
    table = {
        "identity": dict(identity),
        "step": state.step,
        "losses": state.losses,
        "details": state.details,
        "file": name,
        "sha256": sha256(file),
    }
    write_atomically(folder / _CURRENT, json.dumps(table))
    for old in folder.glob("*state-*.safetensors*"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_state(folder: Path, identity: Mapping[str, str]) -> TrainingState | None:
    """The state that was made durable in `folder`, on the CPU; None where there is none.

    Raises ResumeError where it is damaged or was begun with another identity.
    """
    if not (folder / _CURRENT).exists():
        return None
    try:
        table = json.loads((folder / _CURRENT).read_text())
        begun, file = table["identity"], folder / table["file"]
        for key in [*identity, *begun]:
            if identity.get(key) != begun.get(key):
                raise ResumeError(
                    f"the training in {folder} was begun with another {key}: "
                    f"{begun.get(key)}, now {identity.get(key)}",
                    "repeat the request as it was, or discard the work",
                )
        if sha256(file) != table["sha256"]:
            raise _damaged(file)
        details = table.get("details", {})
        return TrainingState(table["step"], load_file(file), table["losses"], details)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder) from error


def _damaged(path: Path) -> ResumeError:
    return ResumeError(
        f"the training cannot be continued: {path} is missing or damaged",
        "discard the work and begin anew",
    )
