"""A teacher computed once: its most likely tokens for every window, on disk, mapped into memory.

Parts of some windows each, `part-00000.safetensors` with `indices` int32 and `log_p` float32, both
[windows, length - 1, k]; a part is whole or not there, so a killed pass goes on at the next one.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from infopt.core.errors import ResumeError
from infopt.core.files import write_atomically
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.training.losses import TopK, top_k

WINDOWS_A_PART = 32
_ENTRY_BYTES = 8


def cache_bytes(windows: int, length: int, k: int) -> int:
    """Bytes that a cache of `windows` windows of `length` tokens takes on disk."""
    return windows * (length - 1) * k * _ENTRY_BYTES


@torch.inference_mode()
def fill_cache(
    folder: Path,
    windows: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    k: int,
    temperature: float,
    progress: ProgressCallback = silent,
) -> None:
    """Keep the k most likely next tokens at every position of windows int64 [n, length].

    `logits` gives those of int64 [1, length - 1], [1, length - 1, vocabulary]; the last token of a
    window has no follower in it.
    Parts that are there already are kept. Log-probabilities are those of the whole distribution
    at `temperature`.
    """
    parts = torch.split(windows, WINDOWS_A_PART)
    finished = sum(_part(folder, index).exists() for index in range(len(parts)))
    seen = min(len(windows), finished * WINDOWS_A_PART)
    done = seen
    for index, part in enumerate(parts):
        if _part(folder, index).exists():
            continue
        indices, log_p = [], []
        for window in part:
            progress(Progress("keeping logits", done, len(windows), "", seen))
            top = top_k(logits(window[None, :-1].clamp(min=0))[0], k, temperature)
            indices.append(top.indices.to(torch.int32).cpu())
            log_p.append(top.log_p.cpu())
            done += 1
        content = {"indices": torch.stack(indices), "log_p": torch.stack(log_p)}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(_part(folder, index), save(content))


class TeacherCache:
    """What `fill_cache` kept, found again by a window's tokens."""

    def __init__(self, folder: Path, windows: Tensor) -> None:
        self._folder = folder
        # Equal windows have equal logits, whichever of them is found.
        self._places = {_key(window): index for index, window in enumerate(windows)}

    def rows(self, window: Tensor, device: torch.device) -> TopK:
        """Of one window int64 [length]: indices and log-probabilities [length - 1, k].

        Raises ResumeError where the file is missing or damaged, KeyError for another window.
        """
        part, place = divmod(self._places[_key(window)], WINDOWS_A_PART)
        file = _part(self._folder, part)
        try:
            with safe_open(file, framework="pt") as stream:
                indices = stream.get_slice("indices")[place]
                log_p = stream.get_slice("log_p")[place]
        except (SafetensorError, OSError) as error:
            raise ResumeError(
                f"the teacher's kept logits cannot be read: {file}: {error}",
                "--yes without --resume computes them again",
            ) from error
        return TopK(indices.to(device, torch.int64), log_p.to(device))


def _part(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.safetensors"


def _key(window: Tensor) -> bytes:
    return window.cpu().to(torch.int64).contiguous().numpy().tobytes()
