"""The door of `infopt bench kernels --tune`: which tiles are the fastest on the GPU at hand.

Each rule of the shipped table is timed over the examples that it is for, and keeps what it was for:
its tile becomes the candidate that took the least time over all of them. Launches are recorded and
replayed as one, over so many copies of the inputs that the cache holds none when its turn comes
again: what is compared is what a kernel takes in a recorded step, not what Python takes to launch
it, nor what it takes where its weight is in the cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.card import MeasuredTiles, compiler_versions, find_card, load_tiles
from infopt.core.profiling.captured import captured
from infopt.core.profiling.timer import repeat_for
from infopt.core.progress import Progress, ProgressCallback
from infopt.kernels.gpu.tile import Card, Rule, Tile

if TYPE_CHECKING:
    from infopt.kernels.gpu.example import Example, Launch

Work = Callable[[], object]
Seconds = Callable[[Sequence[Work]], float]
"""Median seconds of a call, of calls over inputs that take turns."""
_SECONDS_EACH = 0.1
_LEAST_CALLS, _MOST_COPIES = 20, 64


def tune_tiles(progress: ProgressCallback, kernels: Sequence[str] | None = None) -> MeasuredTiles:
    """Time all candidates on the GPU at hand, or those of some kernels; to be kept by
    `store_tiles`, with what is known of the others.

    Raises UnsupportedError where there is no GPU that kernels are compiled for, UsageError for a
    kernel that is not known.
    """
    device = torch.device("cuda")
    if not torch.cuda.is_available() or find_card("native", device) is None:
        raise UnsupportedError("tiles are measured on an NVIDIA GPU, and there is none", None)
    from infopt.kernels.gpu.examples import EXAMPLES

    card = Card.at_hand(device)
    known = sorted({example.kernel for example in EXAMPLES})
    for name in kernels or ():
        if name not in known:
            raise UsageError(f"no kernel {name!r}", f"with tiles: {', '.join(known)}")
    chosen = [example for example in EXAMPLES if example.kernel in (kernels or known)]
    before = load_tiles(card.name, compiler_versions())
    found = measured_rules(card, chosen, device, partial(replayed, device=device), progress)
    return before.model_copy(update={"kernels": {**before.kernels, **found}})


def replayed(works: Sequence[Work], *, device: torch.device) -> float:
    """Median seconds of a call in passes over all of the works, some twenty calls or more each, so
    that waiting for a pass does not show."""
    each = list(works) * -(-_LEAST_CALLS // len(works))
    return repeat_for(captured(each, device), seconds=_SECONDS_EACH).median / len(each)


def copies_of(example: "Example", device: torch.device) -> "list[Launch]":
    """Launches over inputs of their own, as many as take twice the cache; one without a GPU."""
    if device.type != "cuda":
        return [example.build(device)]
    before = torch.cuda.memory_allocated(device)
    first = example.build(device)
    taken = max(torch.cuda.memory_allocated(device) - before, 1)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(1, min(_MOST_COPIES, -(-2 * cache // taken)))
    return [first, *(example.build(device) for _ in range(count - 1))]


def measured_rules(
    card: Card,
    examples: Sequence["Example"],
    device: torch.device,
    seconds: Seconds,
    progress: ProgressCallback,
) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """The card's rules of each kernel that has examples, their order kept, tiles that were measured
    in place of those that ship; `seconds` beside those, example by example."""
    found: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for kernel in sorted({example.kernel for example in examples}):
        mine = [example for example in examples if example.kernel == kernel]
        found[kernel] = tuple(_measured(card, kernel, mine, device, seconds, progress))
    return found


def _measured(
    card: Card,
    kernel: str,
    examples: Sequence["Example"],
    device: torch.device,
    seconds: Seconds,
    progress: ProgressCallback,
) -> Iterator[Mapping[str, Any]]:
    rules = card.rules[kernel]
    for number, rule in enumerate(rules):
        own = [example for example in examples if _first(rules, example) == number]
        progress(Progress("tune kernels", number, len(rules), kernel))
        told: dict[str, Any] = {"when": dict(rule.when), **rule.tile.as_json()}
        if own:
            tile, times = _fastest(card, rule, own, device, seconds)
            told |= {**tile.as_json(), "seconds": times}
        yield told


def _first(rules: Sequence[Rule], example: "Example") -> int:
    return next(number for number, rule in enumerate(rules) if rule.applies(example.key))


def _fastest(
    card: Card,
    rule: Rule,
    examples: Sequence["Example"],
    device: torch.device,
    seconds: Seconds,
) -> tuple[Tile, dict[str, float]]:
    """By the mean over the examples of each time beside that of the rule's own tile."""
    tiles = [rule.tile]
    for example in examples:
        tiles += [tile for tile in example.candidates if tile not in tiles]
    times: list[dict[str, float]] = [{} for _ in tiles]
    for example in examples:
        launches = copies_of(example, device)
        for tile, taken in zip(tiles, times, strict=True):
            tried = card.preferring({example.kernel: [Rule({}, tile)]})
            try:
                taken[example.name] = seconds([partial(launch, tried) for launch in launches])
            except Exception:  # a tile that this GPU has no room for, or that is not for this shape
                taken[example.name] = math.inf
    own = times[0]

    def beside(taken: Mapping[str, float]) -> float:
        return sum(math.log(taken[name] / own[name]) for name in taken)

    best = min(range(len(tiles)), key=lambda number: beside(times[number]))
    return tiles[best], times[best]
