"""Settings of `infopt prune`."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from infopt.core.recipe.base import Seed, Settings, Words
from infopt.core.recipe.text import CalibrationSettings, Device, DType

PruneMethod = Literal["magnitude", "wanda", "sparsegpt", "structured"]
SIZES = ("layers", "heads", "ffn", "hidden")
"""Settings that name what stays of the model's shape."""
BUDGETS = ("params", "latency")
"""Settings that a shape is solved for."""
_UNSTRUCTURED = frozenset({"magnitude", "wanda", "sparsegpt"})
_CALIBRATED = frozenset({"wanda", "sparsegpt"})
_STRUCTURED = frozenset({"structured"})
_READERS: dict[str, frozenset[str]] = {
    "sparsity": _UNSTRUCTURED,
    "allocation": _UNSTRUCTURED,
    "owl_spread": _UNSTRUCTURED,
    "owl_outlier": _UNSTRUCTURED,
    "ignore": _UNSTRUCTURED,
    "true_sequential": _CALIBRATED,
    "damp_percent": frozenset({"sparsegpt"}),
    **dict.fromkeys(
        (*SIZES, *BUDGETS, "importance", "depth_importance", "iterations"), _STRUCTURED
    ),
}
_OWL = ("owl_spread", "owl_outlier")
_RETRAINING = ("retrain_from", "retrain_tokens", "retrain_length", "learning_rate")
_DIGITS = 9
"""Of a share, behind the point."""
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights go: a `share` of them, or all but `kept` of every `of` neighbours of a row.

    As a word: '0.5', or 'N:M' for N kept of every M along the inputs (2:4 is NVIDIA's).
    """

    share: float
    kept: int | None = None
    of: int | None = None

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else _written(self.share)


def _written(share: float) -> str:
    """As it is read again: a word for every share that `_share` gives."""
    return f"{share:.{_DIGITS}g}"


def _share(value: float) -> float | None:
    """Rounded as it will be written down; None where that is not between 0 and 1."""
    rounded = round(value, _DIGITS)
    return rounded if 0 < rounded < 1 else None


def parse_pattern(word: str) -> Pattern:
    """'0.5', '50%' or '2:4'; raises ValueError saying what a sparsity is."""
    if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", word):
        kept, of = int(found[1]), int(found[2])
        if not 0 < kept < of:
            raise ValueError(f"{word!r} is N:M with N weights kept of every M: 0 < N < M")
        return Pattern(1 - kept / of, kept, of)
    try:
        share = _share(float(word.removesuffix("%")) / (100 if word.endswith("%") else 1))
    except ValueError:
        raise ValueError(
            f"{word!r} is neither a share, such as 0.5, nor N:M, such as 2:4"
        ) from None
    if share is None:
        raise ValueError("the share of weights to remove lies between 0 and 1 (or is N:M, as 2:4)")
    return Pattern(share)


def parse_count(word: int | str) -> int:
    """How many: 100000000, '100M' or '1.2B'; raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmb]?)\s*", str(word), re.IGNORECASE)
    if found is None or not (count := round(float(found[1]) * _COUNTS[found[2].lower()])):
        raise ValueError(f"{word!r} is no number of parameters, such as 100M")
    return count


def parse_times(word: float | str) -> float:
    """'0.7x' or 0.7: a share of what there is, between 0 and 1; raises ValueError."""
    try:
        share = _share(float(str(word).strip().removesuffix("x")))
    except ValueError:
        raise ValueError(f"{word!r} is no share, such as 0.7x") from None
    if share is None:
        raise ValueError(f"{word!r}: what stays is between 0x and 1x of what there is")
    return share


def width_of(word: int | str, whole: int) -> int:
    """How many of `whole` channels stay, for a setting such as 1152 or '0.75x'; unrounded sizes
    of a share go to the nearest number."""
    return word if isinstance(word, int) else round(parse_times(word) * whole)


def _sparsity(value: Any) -> Any:
    """One spelling for 0.5, '0.50' and '50%'."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 60:
        # YAML reads 2:4 as minutes and seconds.
        raise ValueError(f"quote N:M in YAML, as '{value // 60}:{value % 60}'")
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return str(parse_pattern(str(value)))
    return value


def _count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


def _times(value: Any) -> Any:
    return parse_times(value) if isinstance(value, int | float | str) else value


def _width(value: Any) -> Any:
    """A number of channels, or a share such as '0.75x' or 0.75."""
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError("at least 1 stays")
    return f"{_written(parse_times(value))}x" if isinstance(value, float | str) else value


Width = Annotated[Annotated[int, Field(ge=1)] | str, BeforeValidator(_width)]


class PruneSettings(Settings):
    """What to remove, how it is chosen, and how the model recovers."""

    method: PruneMethod | None = None
    """Follows from what is given: structured for sizes and budgets, else wanda."""
    sparsity: Annotated[str, BeforeValidator(_sparsity)] | None = None
    """Share of the weights to remove, or N:M: N kept of every M along the inputs; default 0.5."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """The same share for every block, or less for blocks with more outliers (OWL)."""
    owl_spread: float = Field(default=0.08, gt=0, lt=0.5)
    """How far a block's share may be from the mean (owl only)."""
    owl_outlier: float = Field(default=5.0, gt=1)
    """A weight's score is an outlier from this many times the block's mean on (owl only)."""
    layers: int | None = Field(default=None, ge=1)
    """Blocks that stay."""
    heads: int | None = Field(default=None, ge=1)
    """Query heads that stay in every block; whole KV groups go."""
    ffn: Width | None = None
    """Channels that stay in every block's feed-forward network: a number, or such as 0.75x."""
    hidden: Width | None = None
    """Channels that stay of the hidden states: a number, or such as 0.75x."""
    params: Annotated[Annotated[int, Field(ge=1)], BeforeValidator(_count)] | None = None
    """Parameters that stay, such as 100M; the shape follows."""
    latency: Annotated[Annotated[float, Field(gt=0, lt=1)], BeforeValidator(_times)] | None = None
    """Share of the time of a decoded token, such as 0.7x, predicted from bytes; the shape
    follows."""
    importance: Literal["minitron", "magnitude", "random"] = "minitron"
    """How heads and channels are ranked: by activations, by weights, or by chance."""
    depth_importance: Literal["block-influence", "random"] = "block-influence"
    """How blocks are ranked: by how much they turn the hidden states (ShortGPT), or by chance."""
    iterations: int = Field(default=1, ge=1)
    """Measure and cut in this many rounds (structured only)."""
    retrain: int = Field(default=0, ge=0)
    """Optimizer steps after pruning; what was removed stays removed."""
    retrain_from: Literal["dense", "text"] = "dense"
    """Learn from the dense model's distribution, or from the text alone."""
    retrain_tokens: int = Field(default=4096, ge=1)
    """Tokens of one step."""
    retrain_length: int = Field(default=256, ge=8)
    """Tokens of one window."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of the retraining, at its peak."""
    true_sequential: bool = True
    """Within a block: q/k/v, o, gate/up, down in turn, each seeing those before it pruned."""
    damp_percent: float = Field(default=0.01, gt=0, lt=1)
    """Share of the mean Hessian diagonal added to it (sparsegpt only)."""
    ignore: Words = ("lm_head",)
    """Linear layers left as they are: full names, or patterns with * and ?."""
    calibration: CalibrationSettings = CalibrationSettings()
    device: Device = "auto"
    dtype: DType = "auto"
    """The dtype of the calibration's forward passes; retraining keeps its weights in float32."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Fill what follows; refuse what contradicts the method or would not be read."""
        sizes = [key for key in SIZES if getattr(self, key) is not None]
        budgets = [key for key in BUDGETS if getattr(self, key) is not None]
        method = self.method or ("structured" if sizes or budgets else "wanda")
        if problem := self._contradiction(method, sizes, budgets):
            raise ValueError(problem)
        found: dict[str, str] = {"method": method}
        if method != "structured" and self.sparsity is None:
            found["sparsity"] = "0.5"
        for key, value in found.items():
            # Frozen for all others: what was left out is completed once, here.
            object.__setattr__(self, key, value)
        return self

    def _contradiction(self, method: str, sizes: list[str], budgets: list[str]) -> str | None:
        changed = self._changed()
        for option in changed:
            if method not in _READERS.get(option, {method}):
                readers = ", ".join(sorted(_READERS[option]))
                return f"{option} is read by method {readers} only, not by {method}"
        if not self.retrain and (unread := [key for key in _RETRAINING if key in changed]):
            return f"{unread[0]} is read where the model is retrained: it goes with retrain"
        if self.retrain and self.retrain_tokens < self.retrain_length:
            return (
                f"a step of {self.retrain_tokens} retrain_tokens holds no window of "
                f"{self.retrain_length} (retrain_length)"
            )
        if self.allocation != "owl" and (unread := [key for key in _OWL if key in changed]):
            return f"{unread[0]} is read by allocation owl only"
        if method != "structured":
            if self.allocation == "owl" and self.sparsity and ":" in self.sparsity:
                return f"allocation owl varies the share of a block, and {self.sparsity} fixes it"
            return None
        if not sizes and not budgets:
            names = ", ".join((*SIZES, *BUDGETS))
            return f"method structured wants to know what stays: {names}"
        if len(budgets) > 1 or (sizes and budgets):
            other = (*sizes, *budgets[1:])[0]
            return f"{budgets[0]} chooses the whole shape: it goes without {other}"
        if sizes == ["layers"] and "importance" in changed:
            return "importance ranks heads and channels, and only layers are removed"
        if sizes == ["hidden"] and self.iterations > 1:
            return "iterations cut the hidden width in the last round only, and nothing else goes"
        if sizes and "layers" not in sizes and "depth_importance" in changed:
            return "depth_importance ranks layers, and none are removed"
        return None

    def _changed(self) -> list[str]:
        """The settings that are off their defaults."""
        fields = type(self).model_fields
        return [key for key in fields if getattr(self, key) != fields[key].default]

    @property
    def pattern(self) -> Pattern:
        """What an unstructured method removes."""
        assert self.sparsity is not None
        return parse_pattern(self.sparsity)
