"""The text of a training as windows of tokens, some of them held out."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.artifact.positions import check_length
from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.recipe.train import TrainSettings
from infopt.core.text.sources import calibration_text
from infopt.core.text.windows import default_prefix, token_stream

_HELD_OUT = 0.05


@dataclass(frozen=True, slots=True)
class Windows:
    """What to train on, int64 [n, L], and what to be looked at meanwhile, int64 [m, L].

    A negative token is none: it fills a window up behind its text. `name` is the text's, for
    people; `hash` names the content of both.
    """

    train: Tensor
    held_out: Tensor
    name: str
    hash: str


def training_windows(artifact: Artifact, settings: TrainSettings, seed: int) -> Windows:
    """All windows of the calibration text in an order drawn by `seed`, the last 5% held out.

    Windows do not overlap; the text for evaluation is never among them. Raises UsageError where
    there are not two windows, or for windows longer than the model knows.
    """
    check_length(artifact, settings.sequence_length, "a training's windows")
    text = calibration_text(settings.text)
    tokenizer = artifact.tokenizer()
    prefix = [] if settings.chat else default_prefix(tokenizer)
    tokens = token_stream(text, tokenizer, chat=settings.chat)[len(prefix) :]
    step = settings.sequence_length - len(prefix)
    count = len(tokens) // step
    if count < 2:
        raise UsageError(
            f"the text {text.name} has {len(tokens)} tokens: not two windows of "
            f"{settings.sequence_length}",
            "give a longer text or ask for a shorter sequence_length",
        )
    rows = tokens[: count * step].view(count, step)
    begun = torch.tensor(prefix, dtype=torch.int64).expand(count, -1)
    return split_windows(torch.cat([begun, rows], dim=1), text.name, seed)


def split_windows(rows: Tensor, name: str, seed: int) -> Windows:
    """Windows int64 [n, L] in an order drawn by `seed`: the last 5%, and one at least, held out.

    Raises UsageError where there are not two.
    """
    count = len(rows)
    if count < 2:
        raise UsageError(f"{name} is {count} windows: there must be two, one of them held out")
    rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    kept = count - math.ceil(_HELD_OUT * count)
    train, held_out = rows[:kept], rows[kept:]
    return Windows(train, held_out, name, windows_hash(train, held_out))


def windows_hash(train: Tensor, held_out: Tensor) -> str:
    """SHA-256 of shapes and contents, in hex."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
