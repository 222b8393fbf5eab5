"""Text that a model writes itself, through the runtime: for on-policy and sequence-level learning.

On-policy learning takes the divergence on what the student writes (GKD, Agarwal et al., 2023,
https://arxiv.org/abs/2306.13649), sequence-level learning on what the teacher writes (Kim and Rush,
2016, https://arxiv.org/abs/1606.07947).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.errors import EngineError
from infopt.core.recipe.serve import EngineSettings
from infopt.core.recipe.text import DType
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams
from infopt.core.training.artifact import trained_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 16
_AT_ONCE = 32
"""Windows that are written on together."""
_WORDS: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True)
class Learning(Artifact):
    """An artifact with newer weights in memory: how a model that is learning would be stored."""

    newer: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def tensor(self, name: str) -> Tensor:
        """The newer one, where there is one."""
        return self.newer[name] if name in self.newer else super().tensor(name)


def learning(artifact: Artifact, model: "PreTrainedModel") -> Learning:
    """`artifact` with the weights that `model` has now."""
    same = {entry.name: getattr(artifact, entry.name) for entry in fields(Artifact)}
    return Learning(**same, newer=trained_tensors(model, artifact))


def prompt_length(length: int) -> int:
    """Tokens that the text gives of a window; the model writes the rest."""
    return length // 2


def written_windows(
    artifact: Artifact,
    windows: Tensor,
    seeds: Sequence[int],
    *,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Windows int64 [n, length] whose second halves the model wrote; a seed for each of them.

    It goes on past an end of text: who learns from it knows where that is. Temperature 0 is greedy.
    Raises UnsupportedError for a model that the runtime does not know, EngineError where its logits
    are not finite.
    """
    count, length = windows.shape
    running = min(count, _AT_ONCE)
    settings = EngineSettings(
        block_size=_BLOCK,
        kv_blocks=running * -(-length // _BLOCK),
        max_running=running,
        max_model_len=length,
        device="cuda" if device.type == "cuda" else "cpu",
        dtype=_WORDS[dtype],
    )
    with torch.autocast(device.type, enabled=False):  # a step of a training may be around us
        return _written(Engine.load(artifact, settings), artifact.name, windows, seeds, temperature)


def _written(
    engine: Engine, name: str, windows: Tensor, seeds: Sequence[int], temperature: float
) -> Tensor:
    length = windows.shape[1]
    given = prompt_length(length)
    texts = [row[:given].clamp(min=0).tolist() for row in windows]
    for number, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        params = SamplingParams(length - given, temperature, seed=seed, ignore_eos=True)
        engine.add(str(number), text, params)
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise EngineError(f"{name} wrote no text: {output.error}")
            texts[int(output.request_id)] += output.token_ids
    return torch.tensor(texts, dtype=torch.int64)


def drawn(count: int, share: float, seed: int, step: int, part: int) -> tuple[Tensor, list[int]]:
    """Which of `count` windows the student writes on, bool [count], and a seed for each window.

    The same for the same numbers: a training that was interrupted goes on with the same windows.
    """
    generator = torch.Generator().manual_seed(_mixed(seed, step, part))
    chosen = torch.rand(count, generator=generator) < share
    return chosen, torch.randint(2**62, (count,), generator=generator).tolist()


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, by steps of the multiplier of Knuth's MMIX."""
    state = 0
    for number in numbers:
        state = (6364136223846793005 * (state ^ number) + 1442695040888963407) % 2**63
    return state
