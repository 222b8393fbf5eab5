"""Which steps of a recipe may follow each other on the way of one model."""

from collections.abc import Sequence
from typing import Literal, Protocol

from infopt.core.errors import RecipeError

Kind = Literal["rotate", "smooth", "prune", "cut", "join", "distill", "quantize"]
"""What a step does to weights: `prune` makes zeros, `cut` a smaller model, `join` fewer heads."""

_TRANSFORMS: dict[str, Kind] = {"rotate": "rotate", "smoothquant": "smooth"}
_CODES = "quantized weights are codes and scales, which {} would have to round anew"
_LOST: dict[tuple[Kind, Kind], str] = {
    ("quantize", "quantize"): _CODES.format("a second rounding"),
    ("quantize", "prune"): _CODES.format("pruning"),
    ("quantize", "smooth"): _CODES.format("smoothing"),
    ("quantize", "rotate"): _CODES.format("a rotation"),
    ("quantize", "distill"): _CODES.format("training"),
    ("quantize", "cut"): _CODES.format("cutting"),
    ("quantize", "join"): _CODES.format("joining heads"),
    ("prune", "join"): "joined heads are means of others, so that zeros are lost",
    ("prune", "rotate"): "a rotation mixes the columns of a weight, so that its zeros are lost",
    ("smooth", "rotate"): "a rotation folds the norms into the weights, which undoes the smoothing",
}
"""(earlier, later) on the way of one model: what the later would destroy."""
_ORDER = (
    "the order is: rotate, then smooth, then cut or join, then prune, then distill, then quantize"
)

_Done = tuple[tuple[int, Kind], ...]


class OrderedStep(Protocol):
    """A step as the recipe knows it."""

    @property
    def verb(self) -> str: ...
    @property
    def settings(self) -> object: ...
    @property
    def model(self) -> str | None: ...
    @property
    def output(self) -> str | None: ...


def kinds(step: OrderedStep) -> tuple[Kind, ...]:
    """What a step does to weights, in its order; nothing where it only reads them.

    `prune` makes zeros, or with sizes a smaller model; `convert` with heads joins them, and
    `distill` with Medusa heads leaves the model as it is. `quantize` with the method rotate or
    smoothquant does that first, and with the scheme W16A16 nothing else.
    """
    match step.verb:
        case "prune":
            structured = getattr(step.settings, "method", None) == "structured"
            return ("cut",) if structured else ("prune",)
        case "distill":
            return () if getattr(step.settings, "medusa_heads", None) else ("distill",)
        case "convert":
            return ("join",) if hasattr(step.settings, "kv_heads") else ()
        case "quantize":
            return _quantizing(step)
    return ()


def _quantizing(step: OrderedStep) -> tuple[Kind, ...]:
    transform = _TRANSFORMS.get(str(getattr(step.settings, "method", None)))
    if transform is None:
        return ("quantize",)
    if getattr(step.settings, "scheme", None) == "W16A16":
        return (transform,)
    return (transform, "quantize")


def check_order(steps: Sequence[OrderedStep], where: str) -> None:
    """Raise RecipeError where a step destroys what an earlier one did to the same model.

    A step goes on from the newest artifact, or from the earlier output that its `model` names; any
    other model starts anew. `where` names the recipe.
    """
    ways: dict[str, _Done] = {}
    newest: _Done = ()
    for number, step in enumerate(steps, 1):
        done = newest if step.model is None else ways.get(step.model, ())
        adds = kinds(step)
        for earlier_number, earlier in done:
            for later in adds:
                if reason := _LOST.get((earlier, later)):
                    raise RecipeError(
                        f"step {number} of {where} ({_named(step, later)}) comes after step "
                        f"{earlier_number} ({_named(steps[earlier_number - 1], earlier)}) on the "
                        f"same model: {reason}",
                        _hint(number, earlier_number, later),
                    )
        if step.verb == "convert" and getattr(step.settings, "format", None) == "dense":
            done = tuple(entry for entry in done if entry[1] != "quantize")
        if adds or step.verb == "convert":
            newest = (*done, *((number, kind) for kind in adds))
            ways[step.output or f"{number:02d}-{step.verb}"] = newest


def _hint(number: int, earlier_number: int, later: Kind) -> str:
    if later == "quantize":
        return "give the step the original by 'model:', or leave one of the two out"
    return f"put step {number} before step {earlier_number}; {_ORDER}"


def _named(step: OrderedStep, kind: Kind) -> str:
    """The verb, and what it does where that is another word."""
    return step.verb if step.verb == kind else f"{step.verb}: {kind}"
