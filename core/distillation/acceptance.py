"""How well a student would do as a draft of its teacher, both greedy, and how well each predicts.

A draft is right where its most likely token is the teacher's (Leviathan et al., 2022,
https://arxiv.org/abs/2211.17192, at temperature 0). What was accepted so far is the teacher's own
greedy text, so on that text the agreement, position by position, tells exactly what would be
accepted; on a text of others it tells how often the two agree about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.errors import NumericsError, UsageError
from infopt.core.reports.distill import Draft

DRAFTED = 4
"""Tokens that a draft offers at once."""
_CONTEXT = 1024
_PROMPT = 64
_WRITTEN = 64
_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Read:
    """A model on a text: nats a token, and its most likely token at each scored position [n]."""

    nll: float
    choices: Tensor


@dataclass(frozen=True, slots=True)
class Original:
    """What students are held against: the teacher on the text, and what it goes on to write.

    written: int64 [prompts, prompt + written]; prompt: tokens of it that the text gave.
    """

    text: Tensor
    read: Read
    written: Tensor
    prompt: int


def agreement(one: Tensor, other: Tensor) -> float:
    """The share of positions at which two choices of tokens are the same."""
    return float((one == other).double().mean())


def accepted_runs(agree: Sequence[bool], drafted: int) -> list[int]:
    """How many of `drafted` tokens are accepted in each round over a text of agreements.

    A round accepts up to the first disagreement, and the teacher gives one token itself; rounds
    that the text has no room for are left out.
    """
    runs: list[int] = []
    start = 0
    while start + drafted <= len(agree):
        offered = agree[start : start + drafted]
        run = offered.index(False) if False in offered else drafted
        runs.append(run)
        start += run + 1
    return runs


@torch.inference_mode()
def look_at(teacher: PreTrainedModel, text: Tensor) -> Original:
    """Let the teacher read a text int64 [n] and go on from places in it, greedily.

    Raises UsageError for a text that is too short to go on from.
    """
    places = text[: len(text) // _PROMPT * _PROMPT].view(-1, _PROMPT)
    if not len(places):
        raise UsageError(f"the text has {len(text)} tokens, and {_PROMPT} are needed to go on from")
    chosen = places[torch.linspace(0, len(places) - 1, min(_PROMPTS, len(places))).long()]
    return Original(text, read_text(teacher, text), _write_on(teacher, chosen), _PROMPT)


@torch.inference_mode()
def judge(student: PreTrainedModel, original: Original) -> tuple[float, Draft]:
    """The student's nats a token on the text, and how good a draft it is."""
    read = read_text(student, original.text)
    first = original.prompt
    logits = student(input_ids=original.written[:, :-1].to(student.device), use_cache=False).logits
    agree = logits[:, first - 1 :].argmax(-1).cpu() == original.written[:, first:]
    runs = [run for row in agree.tolist() for run in accepted_runs(row, DRAFTED)]
    return read.nll, Draft(
        text=agreement(read.choices, original.read.choices),
        greedy=float(agree.double().mean()),
        mean_run=sum(runs) / len(runs),
    )


@torch.inference_mode()
def read_text(model: PreTrainedModel, text: Tensor) -> Read:
    """Windows of at most 1,024 tokens of a text int64 [n], the first token of each not scored.

    Raises NumericsError where the logits are not finite.
    """
    total, choices = 0.0, []
    for window in torch.split(text.to(model.device), min(_CONTEXT, _positions(model))):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        choices.append(logits.argmax(-1).cpu())
    if not total < float("inf"):
        raise NumericsError(
            f"the logits of {type(model).__name__} are not finite", "try --dtype float32"
        )
    found = torch.cat(choices)
    return Read(total / len(found), found)


def _write_on(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Prompts int64 [n, length] with the most likely tokens behind them."""
    room = _positions(model) - prompts.shape[1]
    tokens, fed, past = prompts, prompts, None
    for _ in range(max(DRAFTED, min(_WRITTEN, room))):
        found = model(input_ids=fed.to(model.device), past_key_values=past, use_cache=True)
        fed, past = found.logits[:, -1:].argmax(-1).cpu(), found.past_key_values
        tokens = torch.cat([tokens, fed], dim=1)
    return tokens


def _positions(model: PreTrainedModel) -> int:
    """That the model knows; where it does not say, enough."""
    return int(getattr(model.config, "max_position_embeddings", None) or _CONTEXT)
