"""A language model that learns from text, from a teacher, or from both."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.training.data import Windows
from infopt.core.training.holes import empty, hold
from infopt.core.training.losses import Kind, cross_entropy, divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AT_ONCE = 2048
"""Held-out tokens of one pass."""


class CausalLearner:
    """The share `alpha` of the loss is the divergence from `teacher`, the rest cross-entropy.

    Without a teacher it is cross-entropy alone. A token is predicted from those before it in its
    window; a negative one is not counted. `trained` names the parameters that learn, all where it
    is left out; tied ones are one. `masks` (true where a weight stays) hold: what they cut is zero
    after every step, and has no gradient. `model` is in float32 and in eval mode: no dropout.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        teacher: "PreTrainedModel | None" = None,
        kind: Kind = "forward-kl",
        temperature: float = 1.0,
        beta: float = 0.5,
        alpha: float = 1.0,
        trained: Collection[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Raises ValueError for an alpha beyond 0 to 1, a name that the model has not, a mask of
        another shape than its parameter's, or parameters that are not float32."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha} is not within 0 and 1")
        self.model = model
        self.teacher = teacher if alpha > 0 else None
        self.alpha = alpha if teacher is not None else 0.0
        self.kind, self.temperature, self.beta = kind, temperature, beta
        self._learned = _learned(model, trained)
        self._holes = hold(model, masks or {}, self._learned)
        self.after_step()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns."""
        return self._learned

    def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """`loss`, and of its parts `divergence` and `cross_entropy` those that it is made of."""
        follow = tokens[:, 1:].flatten()
        shown = tokens[:, :-1].clamp(min=0)
        student = next_token_logits(self.model, shown)
        parts: dict[str, Tensor] = {}
        if self.teacher is not None:
            with torch.no_grad():
                teacher = next_token_logits(self.teacher, shown)
            if teacher.shape != student.shape:
                raise UnsupportedError(
                    f"the student knows {student.shape[1]} tokens, its teacher {teacher.shape[1]}",
                    "both need the same vocabulary",
                )
            counted = follow >= 0
            rows = (student, teacher)
            if not bool(counted.all()):
                rows = (student[counted], teacher[counted])
            parts["divergence"] = divergence(
                *rows, kind=self.kind, temperature=self.temperature, beta=self.beta
            )
        if self.alpha < 1:
            parts["cross_entropy"] = cross_entropy(student, follow)
        shares = {"divergence": self.alpha, "cross_entropy": 1 - self.alpha}
        loss = torch.stack([shares[name] * value for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}

    def after_step(self) -> None:
        """Cut what the masks cut."""
        empty(self._holes, self._learned)

    def recompute(self) -> None:
        """Do without the activations within the model's blocks."""
        recompute_blocks(self.model)


def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits [n * length, vocabulary] behind each of tokens int64 [n, length]."""
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.flatten(0, 1)


def recompute_blocks(model: "PreTrainedModel") -> None:
    """Let every block of the decoder keep its input only, and compute the rest again to go back.

    transformers' own way is tied to training mode, and so to dropout.
    """
    from infopt.core.models.hf import blocks

    for _, block in blocks(model):
        if getattr(block.forward, "func", None) is checkpoint:
            continue  # it does already
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


@torch.no_grad()
def held_out_nll(model: "PreTrainedModel", windows: Windows) -> float:
    """Nats a token of the held-out windows, the first token of each not scored.

    Raises NumericsError where that is not finite.
    """
    total, scored = 0.0, 0
    length = windows.held_out.shape[1]
    for part in torch.split(windows.held_out.to(model.device), max(1, _AT_ONCE // length)):
        follow = part[:, 1:].flatten()
        logits = next_token_logits(model, part[:, :-1].clamp(min=0)).float()
        chosen = follow.where(follow >= 0, -1)
        total += float(F.cross_entropy(logits, chosen, ignore_index=-1, reduction="sum"))
        scored += int((follow >= 0).sum())
    if not total < float("inf"):
        raise NumericsError(
            "the model's logits on the held-out text are not finite", "try precision float32"
        )
    return total / max(1, scored)


def _learned(model: nn.Module, trained: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that learn by the first of their names; all others are frozen."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = set(names.values())
    if trained is not None:
        known = dict(model.named_parameters(remove_duplicate=False))
        if unknown := sorted(set(trained) - set(known)):
            raise ValueError(f"the model has no parameter {unknown[0]}")
        wanted = {names[id(known[name])] for name in trained}
    found = {name: value for name, value in model.named_parameters() if name in wanted}
    for name, parameter in found.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}: what learns is loaded in float32")
    model.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_()
    return found
