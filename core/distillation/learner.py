"""A student at its lessons: what is lost on a batch of windows, by all the ways of teaching."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infopt.core.distillation.cache import TeacherCache
from infopt.core.distillation.on_policy import drawn, prompt_length
from infopt.core.distillation.teacher import matched_layers
from infopt.core.recipe.distill import DistillSettings
from infopt.core.training.causal import recompute_blocks
from infopt.core.training.holes import empty, hold, pruned_masks
from infopt.core.training.losses import (
    TopK,
    attention_loss,
    cross_entropy,
    divergence,
    hidden_loss,
    top_k_divergence,
)

Write = Callable[[Tensor, list[int]], Tensor]
"""Windows int64 [n, length] and a seed for each to windows whose second halves the student wrote.
"""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Windows with what of them counts.

    tokens int64 [n, length]; counted bool [n, length - 1]: the positions whose next token is
    predicted; text bool [n]: false where the student wrote it, whom it shall not copy.
    """

    tokens: Tensor
    counted: Tensor
    text: Tensor


class Student:
    """A learner: a model, who teaches it (a model, a cache, or neither), and how.

    `model` is in float32 and in eval mode. `ends`: the tokens after which nothing counts of what a
    model wrote. `write` is how the student writes itself, where it does (on_policy).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: DistillSettings,
        *,
        teacher: PreTrainedModel | None = None,
        cache: TeacherCache | None = None,
        ends: Collection[int] = (),
        write: Write | None = None,
    ) -> None:
        """Raises UnsupportedError where layers are to be matched and cannot be."""
        self.model, self.settings = model, settings
        self.teacher, self.cache = teacher, cache
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)
        self._write = write
        self._step = self._part = self._counted = 0
        matches = teacher is not None and (settings.hidden_weight or settings.attention_weight)
        self._pairs = matched_layers(model, teacher) if teacher is not None and matches else []
        self._projections = self._make_projections() if settings.hidden_weight else {}
        model.requires_grad_(True)
        self._learned = dict(model.named_parameters())
        self._holes = hold(model, pruned_masks(model), self._learned)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The model's, and the projections that states are compared through."""
        return {**self._learned, **self._projections}

    def at_step(self, step: int) -> None:
        """What the student writes depends on the step, and on nothing before it."""
        self._step, self._part = step, 0

    def after_step(self) -> None:
        """What was pruned stays so."""
        empty(self._holes, self._learned)

    def counted(self) -> int:
        """The tokens that the last loss was a mean over: of what models write not all count."""
        return self._counted

    def recompute(self) -> None:
        """Do without the activations within the model's blocks."""
        recompute_blocks(self.model)

    def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """`loss` of windows int64 [n, length], and the parts that it is made of.

        Each is a mean over all tokens that count. To what the student wrote itself, and shall not
        copy, the cross-entropy adds nothing.
        """
        settings = self.settings
        lesson = self._lesson(tokens)
        self._counted = int(lesson.counted.sum())
        shown, whole = lesson.tokens[:, :-1].clamp(min=0), bool(lesson.counted.all())
        found = self._pass(self.model, shown)
        logits = _chosen(found.logits, lesson.counted, whole)
        parts: dict[str, Tensor] = {}
        shares: dict[str, float] = {}
        other: Any = None
        if self.teacher is not None and (settings.alpha > 0 or self._pairs):
            with torch.no_grad():
                other = self._pass(self.teacher, shown)
        if settings.alpha > 0:
            shares["divergence"] = settings.alpha
            parts["divergence"] = self._divergence(logits, lesson, other, whole)
        if settings.alpha < 1:
            follow = lesson.tokens[:, 1:].where(lesson.text[:, None], -1)[lesson.counted]
            of_text = (follow >= 0).sum() / max(1, self._counted)
            shares["cross_entropy"] = 1 - settings.alpha
            parts["cross_entropy"] = cross_entropy(logits, follow) * of_text
        if settings.hidden_weight:
            shares["hidden"] = settings.hidden_weight
            parts["hidden"] = self._hidden(found, other, lesson.counted)
        if settings.attention_weight:
            shares["attention"] = settings.attention_weight
            parts["attention"] = self._attention(found, other, lesson.counted)
        total = torch.stack([shares[name] * value for name, value in parts.items()]).sum()
        return {"loss": total, **parts}

    def _pass(self, model: PreTrainedModel, shown: Tensor) -> Any:
        settings = self.settings
        return model(
            input_ids=shown,
            use_cache=False,
            output_hidden_states=bool(settings.hidden_weight),
            output_attentions=bool(settings.attention_weight),
        )

    def _lesson(self, tokens: Tensor) -> Lesson:
        """What is learned from a batch: the text, or what a model made of it."""
        count, length = tokens.shape
        given = prompt_length(length)
        written = torch.full((count,), self.settings.sequence_level, device=tokens.device)
        text = torch.ones(count, dtype=torch.bool, device=tokens.device)
        if self._write is not None:
            settings = self.settings
            chosen, seeds = drawn(count, settings.on_policy, settings.seed, self._step, self._part)
            self._part += 1
            if bool(chosen.any()):
                of_chosen = [seed for seed, wanted in zip(seeds, chosen, strict=True) if wanted]
                own = self._write(tokens[chosen.to(tokens.device)].cpu(), of_chosen)
                written = chosen.to(tokens.device)
                text = ~written
                tokens = tokens.clone()
                tokens[written] = own.to(tokens.device)
        return Lesson(tokens, counted_positions(tokens, written, given, self._ends), text)

    def _divergence(self, logits: Tensor, lesson: Lesson, other: Any, whole: bool) -> Tensor:
        settings = self.settings
        if self.cache is not None:
            tops = [self.cache.rows(window, logits.device) for window in lesson.tokens]
            keep = lesson.counted.flatten()
            top = TopK(
                torch.cat([one.indices for one in tops])[keep],
                torch.cat([one.log_p for one in tops])[keep],
            )
            return top_k_divergence(logits, top, temperature=settings.temperature)
        wanted = _chosen(other.logits, lesson.counted, whole)
        return divergence(
            logits,
            wanted,
            kind=settings.loss,
            temperature=settings.temperature,
            beta=settings.beta,
        )

    def _hidden(self, found: Any, other: Any, counted: Tensor) -> Tensor:
        """The mean over matched layers; states of what does not count are left out."""
        losses = [
            hidden_loss(
                found.hidden_states[ours][counted],
                other.hidden_states[theirs][counted],
                self._projections.get(f"projection.{ours}"),
            )
            for ours, theirs in self._pairs
        ]
        return torch.stack(losses).mean()

    def _attention(self, found: Any, other: Any, counted: Tensor) -> Tensor:
        losses = [
            attention_loss(
                _rows_of(found.attentions[ours - 1], counted),
                _rows_of(other.attentions[theirs - 1], counted),
            )
            for ours, theirs in self._pairs
        ]
        return torch.stack(losses).mean()

    def _make_projections(self) -> dict[str, nn.Parameter]:
        """From the student's width to the teacher's, where they differ: one for each layer."""
        assert self.teacher is not None
        narrow, wide = (_width(model) for model in (self.model, self.teacher))
        if narrow == wide:
            return {}
        generator = torch.Generator().manual_seed(self.settings.seed)
        return {
            f"projection.{ours}": nn.Parameter(
                (torch.randn(wide, narrow, generator=generator) / narrow**0.5).to(self.model.device)
            )
            for ours, _ in self._pairs
        }


def counted_positions(tokens: Tensor, written: Tensor, given: int, ends: Tensor) -> Tensor:
    """Which next tokens of windows int64 [n, length] count: bool [n, length - 1].

    Of windows that a model wrote (bool [n]) those behind the first `given`, up to and with the
    first end of text there; of others all. A negative token never counts.
    """
    follow = tokens[:, 1:]
    position = torch.arange(1, tokens.shape[1], device=tokens.device)
    ended = torch.isin(follow, ends) & (position >= given)
    before = ended.cumsum(dim=1) - ended.to(torch.int64)
    own = (position >= given) & (before == 0)
    return (follow >= 0) & (own | ~written[:, None])


def _chosen(logits: Tensor, counted: Tensor, whole: bool) -> Tensor:
    """The rows [rows, vocabulary] that count; a view where all do."""
    return logits.flatten(0, 1) if whole else logits[counted]


def _rows_of(attention: Tensor, counted: Tensor) -> Tensor:
    """Attention [n, heads, queries, keys] to rows [rows, heads, 1, keys] of queries that count."""
    return attention.transpose(1, 2)[counted].unsqueeze(2)


def _width(model: PreTrainedModel) -> int:
    """Of the states between blocks, which an embedding may lack."""
    return int(model.config.get_text_config().hidden_size)
