"""Settings of `infopt distill`."""

import re
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from infopt.core.recipe.base import Seed, nearest
from infopt.core.recipe.text import Device, DType
from infopt.core.recipe.train import TrainSettings

Size = int | float
"""A whole number as it is, or a float: that share of the teacher's."""
_SIZES = ("layers", "hidden", "ffn", "heads")
_OF_STUDENTS = (
    "student",
    "student_init",
    "loss",
    "temperature",
    "alpha",
    "beta",
    "hidden_weight",
    "attention_weight",
    "on_policy",
    "top_k",
    "sequence_level",
)
"""Settings that the training of heads does not read."""
_SHARE = re.compile(r"(\d*\.?\d+)x")


@dataclass(frozen=True, slots=True)
class StudentShape:
    """The sizes of a student that is cut out of its teacher; None stays the teacher's."""

    layers: Size | None = None
    hidden: Size | None = None
    ffn: Size | None = None
    heads: Size | None = None
    """Query heads."""


class DistillSettings(TrainSettings):
    """Who learns from whom, by which loss, and for how long.

    An option that the others leave unread is refused when it is off its default.
    """

    teacher: str | None = None
    """A model; default: the model that the command is given."""
    student: str | None = None
    """A model, or sizes to cut out of the teacher, such as `layers=6,ffn=0.5x`; default, where a
    teacher is named: the model that the command is given."""
    student_init: Literal["teacher", "random"] = "teacher"
    """What a cut student begins with: the teacher's weights, or random ones."""
    loss: Literal["forward-kl", "reverse-kl", "jsd"] = "forward-kl"
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions; the divergence is multiplied by its square."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Share of the divergence in the loss; the rest is cross-entropy with the text."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share of the mixture (jsd only)."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Of the error of hidden states, added to the loss."""
    attention_weight: float = Field(default=0.0, ge=0)
    """Of the divergence of attention maps, added to the loss."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of windows of which the student writes the second half itself."""
    sequence_level: bool = False
    """Let the teacher write the second half of every window, and learn from that half alone."""
    sequence_temperature: float = Field(default=1.0, ge=0)
    """At which the teacher writes; 0 is greedy (sequence_level only)."""
    top_k: int | None = Field(default=None, ge=1)
    """Compute the teacher once, and keep this many of its most likely tokens on disk."""
    medusa_heads: int | None = Field(default=None, ge=1, le=16)
    """Train this many Medusa heads on the model as it is, and no student."""
    medusa_layers: int = Field(default=1, ge=1)
    """Residual blocks of a head."""
    medusa_targets: Literal["greedy", "text"] = "greedy"
    """What heads learn to guess: the model's own greedy tokens, or the text's."""
    medusa_projection: Literal["shared", "own"] = "shared"
    """The projection to the vocabulary: the model's, or one for each head."""
    medusa_start: Literal["least-squares", "copy"] = "least-squares"
    """What a projection of its own begins as: lm_head of the state further on, as a linear map
    foretells it, or lm_head as it is."""
    medusa_vocabulary: int | None = Field(default=None, ge=2)
    """Let projections of their own choose among this many of the text's commonest tokens alone;
    default: the whole vocabulary."""
    steps: int = Field(default=1000, ge=1)
    device: Device = "auto"
    dtype: DType = "auto"
    """Of the teacher's passes, and of the measurements."""
    seed: Seed = 0

    @property
    def train(self) -> TrainSettings:
        """How long, how fast and on which text, apart from all else."""
        return TrainSettings(**{key: getattr(self, key) for key in TrainSettings.model_fields})

    @model_validator(mode="after")
    def _is_one_request(self) -> Self:
        """Refuse what contradicts itself or would not be read."""
        for problem in (self._without_student(), self._unread()):
            if problem:
                raise ValueError(problem)
        if self.student is not None:
            shape_of(self.student)
        return self

    def _without_student(self) -> str | None:
        if self.medusa_heads is not None:
            changed = [key for key in _OF_STUDENTS if self._is_set(key)]
            if changed:
                return f"{changed[0]} is not read where medusa_heads are trained"
            for key in ("medusa_start", "medusa_vocabulary"):
                if self.medusa_projection == "shared" and self._is_set(key):
                    return f"{key} is for medusa_projection: own"
            return None
        for key in type(self).model_fields:
            if key.startswith("medusa_") and self._is_set(key):
                return f"{key} is not read without medusa_heads"
        if self.student is None and self.teacher is None:
            return "the student is missing: a model, or sizes such as layers=6,ffn=0.5x"
        cut = self.student is not None and shape_of(self.student) is not None
        if self._is_set("student_init") and not cut:
            return "student_init is for a student that is cut out of its teacher"
        return None

    def _unread(self) -> str | None:
        if self._is_set("beta") and self.loss != "jsd":
            return f"beta is not read by loss {self.loss}"
        if self._is_set("sequence_temperature") and not self.sequence_level:
            return "sequence_temperature is not read without sequence_level"
        if self.alpha == 0:
            for key in ("loss", "temperature", "on_policy", "top_k"):
                if self._is_set(key):
                    return f"{key} is not read where alpha is 0: there is no divergence"
        if self.top_k is not None:
            if self.loss != "forward-kl":
                return f"top_k knows forward-kl alone, not {self.loss}"
            for key in ("hidden_weight", "attention_weight", "on_policy"):
                if self._is_set(key):
                    return f"{key} needs the teacher at every step, top_k keeps only its logits"
        if self.attention_weight and self.gradient_checkpointing:
            return "attention_weight needs the maps that gradient_checkpointing does not hold"
        if self.on_policy and self.sequence_level:
            return "on_policy and sequence_level both say who writes the second half of a window"
        return None

    def _is_set(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)


def shape_of(word: str) -> StudentShape | None:
    """The sizes that a word such as `layers=6,hidden=0.5x` says; None for the name of a model.

    Raises ValueError for a size that is unknown, is there twice, or is no size.
    """
    if "=" not in word or "/" in word:
        return None
    found: dict[str, Size] = {}
    for part in word.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in _SIZES:
            raise ValueError(f"a student has no size {key!r}; {nearest(key, list(_SIZES))}")
        if key in found:
            raise ValueError(f"the student's {key} are there twice")
        found[key] = _size(key, value)
    return StudentShape(**found)


def _size(key: str, value: str) -> Size:
    if value.isdigit() and int(value) > 0:
        return int(value)
    share = _SHARE.fullmatch(value)
    if share is None or not 0 < float(share[1]) <= 1:
        raise ValueError(f"{key}={value} is no size: a whole number, or a share such as 0.5x")
    return float(share[1])
