"""A frozen model as Medusa heads see it, and the heads as the training loop sees them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infopt.core.distillation import medusa
from infopt.core.distillation.medusa import NOTHING, Projection
from infopt.core.errors import UnsupportedError

_PROBE = 8
"""Tokens on which the logits are compared with what is taken for their making."""
_KEPT_BYTES = 1 << 30
"""Of states of windows that may come again; 466,000 tokens of the default model."""
_TOLERANCE = 0.02
"""Of the largest logit: 16-bit arithmetic in another order."""


class _Enough(Exception):
    """What was wanted of a forward pass has been seen."""


class Backbone:
    """A model that does not learn: its last hidden states, and what makes logits of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedError where the model's logits are not its lm_head's."""
        self.model = model.requires_grad_(False)
        self._head = self.head_of(model)
        self.projection = self._proven()

    @property
    def vocabulary(self) -> int:
        return len(self.projection.weight)

    @property
    def hidden_size(self) -> int:
        return self.projection.weight.shape[1]

    @staticmethod
    def head_of(model: PreTrainedModel) -> nn.Linear:
        """The model's projection to its vocabulary; raises UnsupportedError where it has none."""
        found = model.get_output_embeddings()
        if not isinstance(found, nn.Linear):
            raise UnsupportedError(
                f"{type(model).__name__} has no linear lm_head that Medusa heads could stand beside"
            )
        return found

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """What lm_head is given, [n, length, h] in float32; tokens int64 [n, length] on the device.

        Computed in the model's own dtype, whatever a training around it computes in. A negative
        token is none, and what stands in its place means nothing.
        """
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _Enough

        handle = self._head.register_forward_pre_hook(take)
        try:
            with torch.autocast(tokens.device.type, enabled=False), suppress(_Enough):
                self.model(input_ids=tokens.clamp(min=0), use_cache=False)
        finally:
            handle.remove()
        return found[0].float()

    @torch.no_grad()
    def _proven(self) -> Projection:
        """lm_head and what the config says follows it, held against the model's own logits."""
        config = self.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        bias = None if self._head.bias is None else self._head.bias.detach()
        found = Projection(self._head.weight.detach(), bias, softcap, scale)
        tokens = torch.arange(_PROBE, device=self.model.device)[None] % config.vocab_size
        wanted = self.model(input_ids=tokens, use_cache=False).logits.float()
        mine = found.logits(self.states(tokens))
        if not bool((mine - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()):
            raise UnsupportedError(
                f"the logits of {type(self.model).__name__} are not what its lm_head makes of the "
                "last hidden states: Medusa heads cannot stand beside it"
            )
        return found


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of each head's targets, the base's own first: in the text, and of the base's
    greedy tokens."""

    text: list[Tensor]
    base: list[Tensor]


class HeadsLearner:
    """Heads in training; what learns is float32 and begins as the base's own head."""

    def __init__(
        self,
        base: Backbone,
        heads: int,
        layers: int,
        *,
        own: bool,
        targets: str,
        tokens: Tensor | None = None,
    ) -> None:
        """own: each head has a copy of lm_head that learns; targets: 'greedy' or 'text'.

        tokens: int64, those that heads of their own choose among; None for all.
        """
        self.base, self.heads, self.layers, self.targets = base, heads, layers, targets
        self._own = own
        self._learned: dict[str, nn.Parameter] = {}
        device, size = base.projection.weight.device, base.hidden_size
        self._seen = _Seen(base, greedy=targets == "greedy")
        self._tokens = None if tokens is None else tokens.to(device)
        self._places = (
            None if tokens is None else medusa.places_of(tokens, base.vocabulary).to(device)
        )
        self._begin = base.projection
        if self._tokens is not None:
            bias = base.projection.bias
            self._begin = replace(
                base.projection,
                weight=base.projection.weight[self._tokens],
                bias=None if bias is None else bias[self._tokens],
            )
        for head in range(heads):
            for layer in range(layers):
                name = f"blocks.{head}.layers.{layer}"
                weight = torch.zeros(size, size, device=device)
                self._learned[f"{name}.weight"] = nn.Parameter(weight)
                self._learned[f"{name}.bias"] = nn.Parameter(torch.zeros(size, device=device))
            if own:
                copy = self._begin.weight.to(torch.float32, copy=True)
                self._learned[f"lm_heads.{head}.weight"] = nn.Parameter(copy)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._learned

    def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """`loss`, the heads' weighted sum, and each head's own in nats, of windows [n, length]."""
        states, follow = self._seen(tokens)
        if self._places is not None:  # what a head cannot say is not asked of it
            follow = torch.where(follow >= 0, self._places[follow.clamp(min=0)], NOTHING)
        parts: dict[str, Tensor] = {}
        for head in range(self.heads):
            parts[f"head {head + 1}"] = medusa.cross_entropy(
                self._states(head, states), self._projection(head), medusa.ahead(follow, head + 1)
            )
        return {"loss": medusa.medusa_loss(list(parts.values())), **parts}

    @torch.no_grad()
    def foresee(self, windows: Tensor, at_once: int) -> None:
        """Let projections of their own begin by `medusa.foresight` on windows [n, length]."""
        size, device = self.base.hidden_size, self.base.projection.weight.device
        sums = torch.zeros(self.heads, 2, size, size, dtype=torch.float64, device=device)
        for part in torch.split(windows, max(1, at_once // windows.shape[1])):
            tokens = part.to(device)
            states = self.base.states(tokens).double() * (tokens >= 0).unsqueeze(-1)
            for k, (gram, cross) in enumerate(sums, 1):
                # A pair of which one is no token adds nothing to either sum.
                now = (states[:, :-k] * (tokens[:, k:] >= 0).unsqueeze(-1)).flatten(0, 1)
                later = states[:, k:].flatten(0, 1)
                gram.addmm_(now.T, now)
                cross.addmm_(later.T, now)
        table = self._begin.weight.float()
        for head, (gram, cross) in enumerate(sums):
            weight = table @ medusa.foresight(gram, cross).float()
            self._learned[f"lm_heads.{head}.weight"].copy_(weight)

    def after_step(self) -> None:
        """Nothing is held."""

    @torch.no_grad()
    def mean_loss(self, windows: Tensor, at_once: int) -> float:
        """The loss of windows [n, length], `at_once` tokens in a pass."""
        total = 0.0
        for part in torch.split(windows, max(1, at_once // windows.shape[1])):
            loss = self.loss(part.to(self.base.projection.weight.device))["loss"]
            total += float(loss) * len(part) / len(windows)
        return total

    @torch.no_grad()
    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The heads as they are written, in `dtype`; from now on they are just that."""
        for parameter in self._learned.values():
            parameter.copy_(parameter.to(dtype))
        return {name: value.detach().to("cpu", dtype) for name, value in self._learned.items()}

    @torch.no_grad()
    def ranks(self, tokens: Tensor, top: int) -> Ranks:
        """Where the targets stand among each head's `top` guesses, on windows [n, length]."""
        tokens = tokens.to(self.base.projection.weight.device)
        states = self.base.states(tokens)
        own = medusa.guesses(states, self.base.projection, top)
        text, greedy = medusa.following(tokens), own[..., 0]
        guessed = [own]
        for head in range(self.heads):
            ahead = self._states(head, states)
            found = medusa.guesses(ahead, self._projection(head), top)
            guessed.append(found if self._tokens is None else self._tokens[found])
        return Ranks(
            [medusa.ranks(each, medusa.ahead(text, k)) for k, each in enumerate(guessed)],
            [medusa.ranks(each, medusa.ahead(greedy, k)) for k, each in enumerate(guessed)],
        )

    def _states(self, head: int, states: Tensor) -> Tensor:
        names = [f"blocks.{head}.layers.{layer}" for layer in range(self.layers)]
        layers = [(self._learned[f"{n}.weight"], self._learned[f"{n}.bias"]) for n in names]
        return medusa.head_states(states, layers)

    def _projection(self, head: int) -> Projection:
        if not self._own:
            return self.base.projection
        return replace(self._begin, weight=self._learned[f"lm_heads.{head}.weight"])


class _Seen:
    """What the base makes of windows: it does not learn, so once is enough for those that come
    again."""

    def __init__(self, base: Backbone, *, greedy: bool) -> None:
        self._base, self._greedy = base, greedy
        self._kept: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._room = _KEPT_BYTES

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of windows [n, length] the states [n, length, h], and the token that is meant to follow
        each position [n, length]."""
        found = [self._window(window) for window in tokens]
        return torch.stack([states for states, _ in found]), torch.stack([f for _, f in found])

    def _window(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # Each by itself: what stands beside it must not change a bit of what a resumed run sees.
        key = tokens.cpu().numpy().tobytes()
        if (kept := self._kept.get(key)) is not None:
            return kept
        states = self._base.states(tokens[None])[0]
        made = states, self._follow(tokens, states)
        if (size := states.nbytes + made[1].nbytes) <= self._room:
            self._kept[key] = made
            self._room -= size
        return made

    def _follow(self, tokens: Tensor, states: Tensor) -> Tensor:
        if not self._greedy:
            return medusa.following(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            own = medusa.guesses(states, self._base.projection, 1)[..., 0]
        return own.where(tokens >= 0, NOTHING)
