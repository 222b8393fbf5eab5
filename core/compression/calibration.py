"""The text that a compression method sees, as batches of tokens."""

import hashlib

import torch
from torch import Tensor

from infopt.core.artifact.positions import check_length
from infopt.core.artifact.read import Artifact
from infopt.core.hardware.probe import probe
from infopt.core.recipe.text import CalibrationSettings
from infopt.core.text.sources import calibration_text
from infopt.core.text.windows import token_windows

BATCH_TOKENS = 4096
"""Calibration tokens that go through a block at once."""
_KEPT_SHARE = 0.25


def calibration_tokens(artifact: Artifact, settings: CalibrationSettings, seed: int) -> Tensor:
    """Windows of the calibration text, int64 [samples, sequence_length].

    Raises UsageError for windows longer than the model knows, or a text that is too short.
    """
    check_length(artifact, settings.sequence_length)
    return token_windows(
        calibration_text(settings.text),
        artifact.tokenizer(),
        length=settings.sequence_length,
        count=settings.samples,
        seed=seed,
        chat=settings.chat,
    )


def unread_settings(
    settings: CalibrationSettings, *, read: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """A warning that names the settings off their defaults, where only those in `read` are."""
    fields = type(settings).model_fields
    unread = [
        key
        for key, field in fields.items()
        if key not in read and getattr(settings, key) != field.default
    ]
    if not unread:
        return ()
    return (f"not read, for nothing here sees the calibration text: {', '.join(unread)}",)


def batches(tokens: Tensor, batch_tokens: int) -> tuple[Tensor, ...]:
    """Split windows [n, length] into batches of at most `batch_tokens` tokens or one window."""
    return torch.split(tokens, max(1, batch_tokens // tokens.shape[1]))


def token_hash(tokens: Tensor) -> str:
    """SHA-256 of shape and content, in hex."""
    content = tokens.to(torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + content).hexdigest()


def keep_bytes(device: torch.device) -> int:
    """Memory for outputs that would else be computed again: a quarter of what is free."""
    if device.type == "cuda":
        return int(_KEPT_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_KEPT_SHARE * probe().memory_available_bytes)
