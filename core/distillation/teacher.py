"""What a teacher gives: its logits and states as the student learns, its own text before that."""

from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.distillation.on_policy import written_windows
from infopt.core.errors import ResumeError, UnsupportedError, UsageError
from infopt.core.files import write_atomically
from infopt.core.models.hf import blocks, load_transformers
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.training.data import Windows, windows_hash

_WINDOWS_A_PART = 32


def check_vocabularies(teacher: Artifact, student: Artifact) -> None:
    """Raise UsageError where the two do not number the same tokens alike."""
    sizes = [int(artifact.config.get("vocab_size", 0)) for artifact in (teacher, student)]
    hint = "choose a student of the same tokenizer, or cut one: --student layers=6"
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{student.name} knows {sizes[1]} tokens, its teacher {teacher.name} {sizes[0]}: "
            "their predictions cannot be compared",
            hint,
        )
    theirs, ours = (artifact.tokenizer().get_vocab() for artifact in (teacher, student))
    if theirs != ours:
        strange = next(iter(sorted(set(theirs.items()) ^ set(ours.items()))))
        raise UsageError(
            f"{student.name} and its teacher {teacher.name} have different vocabularies: "
            f"the token {strange[0]!r} is not the same in both",
            hint,
        )


def load_teacher(
    artifact: Artifact, dtype: torch.dtype, device: torch.device, *, attention: bool
) -> PreTrainedModel:
    """A model that does not learn; `attention`: one that tells its attention maps."""
    model = load_transformers(artifact, dtype, device)
    if attention:
        show_attention(model)
    return model


def show_attention(model: PreTrainedModel) -> None:
    """Let a model compute attention so that its maps can be seen.

    Raises UnsupportedError where transformers knows no such way for it.
    """
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise UnsupportedError(
            f"the attention of {type(model).__name__} cannot be seen: {error}",
            "leave attention_weight away",
        ) from error


def matched_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[int, int]]:
    """Pairs of layers (student, teacher), from 1, that are as deep in their models.

    Raises UnsupportedError for a student of more layers than its teacher has.
    """
    ours, theirs = len(blocks(student)), len(blocks(teacher))
    if ours > theirs:
        raise UnsupportedError(
            f"the student's {ours} layers cannot be matched with the teacher's {theirs}",
            "leave hidden_weight and attention_weight away",
        )
    return [(layer, round(layer * theirs / ours)) for layer in range(1, ours + 1)]


def taught_windows(
    artifact: Artifact,
    windows: Windows,
    folder: Path,
    *,
    temperature: float,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: ProgressCallback = silent,
) -> Windows:
    """The windows to train on, their second halves written by the teacher.

    Kept in `folder` part by part: a part is whole or not there, and what is there is not written
    again. The held-out windows stay the text's.
    """
    chosen = windows.train
    seeds = torch.randint(
        2**62, (len(chosen),), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    found: list[Tensor] = []
    resumed: int | None = None
    for index, part in enumerate(torch.split(chosen, _WINDOWS_A_PART)):
        file = folder / f"part-{index:05d}.safetensors"
        done = index * _WINDOWS_A_PART
        if not file.exists():
            resumed = done if resumed is None else resumed
            progress(Progress("teacher writing", done, len(chosen), "windows", resumed))
            of_part = seeds[done : done + len(part)]
            written = written_windows(
                artifact, part, of_part, temperature=temperature, dtype=dtype, device=device
            )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save({"windows": written}))
        found.append(_read(file, part))
    train = torch.cat(found)
    name = f"{windows.name}, continued by {artifact.name}"
    return Windows(train, windows.held_out, name, windows_hash(train, windows.held_out))


def _read(file: Path, part: Tensor) -> Tensor:
    try:
        found: Tensor = load(file.read_bytes())["windows"]
    except Exception as error:  # safetensors raises an exception of its own kind
        raise _damaged(file) from error
    if found.shape != part.shape:
        raise _damaged(file)
    return found


def _damaged(file: Path) -> ResumeError:
    return ResumeError(
        f"what the teacher wrote cannot be read: {file} is damaged",
        "--yes without --resume begins anew",
    )
