"""The door of `infopt bench kernels --tune`: which tiles are the fastest on the GPU at hand.

Each rule of the shipped table is timed over the examples that it is for, and keeps what it was for:
its tile becomes the candidate that took the least time over all of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from infopt.core.errors import UnsupportedError
from infopt.core.hardware.card import MeasuredTiles, compiler_versions, find_card
from infopt.core.profiling.calibrate import complete
from infopt.core.profiling.timer import repeat_for
from infopt.core.progress import Progress, ProgressCallback
from infopt.kernels.gpu.tile import Card, Rule, Tile

if TYPE_CHECKING:
    from infopt.kernels.gpu.example import Example

Seconds = Callable[[Callable[[], object]], float]
"""Median seconds of a call."""
_SECONDS_EACH = 0.2


def tune_tiles(progress: ProgressCallback) -> MeasuredTiles:
    """Time all candidates on the GPU at hand; to be kept by `store_tiles`.

    Raises UnsupportedError where there is no GPU that kernels are compiled for.
    """
    device = torch.device("cuda")
    if not torch.cuda.is_available() or find_card("native", device) is None:
        raise UnsupportedError("tiles are measured on an NVIDIA GPU, and there is none", None)
    from infopt.kernels.gpu.examples import EXAMPLES

    def seconds(work: Callable[[], object]) -> float:
        many, calls = complete(work, device)
        return repeat_for(many, seconds=_SECONDS_EACH).median / calls

    card = Card.at_hand(device)
    kernels = measured_rules(card, EXAMPLES, device, seconds, progress)
    return MeasuredTiles(device=card.name, versions=compiler_versions(), kernels=kernels)


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
        launch = example.build(device)
        for tile, taken in zip(tiles, times, strict=True):
            tried = card.preferring({example.kernel: [Rule({}, tile)]})
            try:
                launch(tried)
                taken[example.name] = seconds(partial(launch, tried))
            except Exception:  # a tile that this GPU has no room for, or that is not for this shape
                taken[example.name] = math.inf
    own = times[0]

    def beside(taken: Mapping[str, float]) -> float:
        return sum(math.log(taken[name] / own[name]) for name in taken)

    best = min(range(len(tiles)), key=lambda number: beside(times[number]))
    return tiles[best], times[best]
