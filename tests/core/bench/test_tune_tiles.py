"""Tiles are chosen by what they took, and a rule keeps what it was for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from infopt.core.bench.tune_tiles import copies_of, measured_rules, replayed, tune_tiles
from infopt.core.errors import UnsupportedError
from infopt.core.hardware.card import MeasuredTiles
from infopt.kernels.gpu.example import Example, Launch
from infopt.kernels.gpu.tile import Card, Rule, Tile

SMALL, LARGE, WIDE = Tile({"N": 16}, 4, 2), Tile({"N": 64}, 4, 2), Tile({"N": 128}, 8, 2)
CPU = torch.device("cpu")
RULES = [Rule({"m": [1, 16]}, SMALL), Rule({"m": 99}, SMALL), Rule({}, LARGE)]
CARD = Card("a card", 90, 132, 1, {"k": RULES})
# Seconds by example and tile; a tile that is not there does not run.
TIMES = {
    "one": {16: 4.0, 64: 1.0, 128: 3.0},
    "sixteen": {16: 4.0, 64: 5.0, 128: 0.5},
    "many": {16: 1.0, 64: 2.0},
}


class Clock:
    """Tells for a call what the launch in it would take."""

    def __init__(self) -> None:
        self.last = 0.0

    def example(self, name: str, m: int) -> Example:
        def build(_: torch.device) -> Launch:
            def launch(card: Card) -> None:
                self.last = TIMES[name][card.tile("k", m=m).constants["N"]]

            return launch

        return Example(name, "k", {"m": m}, build, candidates=(LARGE, WIDE, SMALL))

    def seconds(self, works: Sequence[Callable[[], object]]) -> float:
        (work,) = works
        work()
        return self.last


def test_a_rule_takes_the_tile_that_is_best_over_its_examples() -> None:
    clock = Clock()
    examples = [clock.example("one", 1), clock.example("sixteen", 16), clock.example("many", 17)]
    found = measured_rules(CARD, examples, CPU, clock.seconds, lambda _: None)
    first, second, last = found["k"]
    assert first["when"] == {"m": [1, 16]} and first["constants"] == {"N": 128}
    assert first["seconds"] == {"one": 3.0, "sixteen": 0.5}
    assert second == {"when": {"m": 99}, **SMALL.as_json()}, "no example is for it"
    assert last["when"] == {} and last["constants"] == {"N": 16}
    rules = MeasuredTiles(device="a card", versions="1", kernels=found).rules()
    tuned = CARD.preferring(rules)
    assert tuned.tile("k", m=5) == WIDE and tuned.tile("k", m=99) == SMALL
    assert tuned.tile("k", m=500) == SMALL


def test_launches_are_made_in_passes_that_are_long_enough() -> None:
    """Without a GPU they are called, not replayed; how often is the same."""
    calls: list[int] = []
    seconds = replayed([lambda: calls.append(0), lambda: calls.append(1)], device=CPU)
    # Once before, to be compiled; then whole passes of twenty calls, the inputs taking turns.
    assert seconds > 0 and len(calls) % 20 == 0 and len(calls) >= 4 * 20
    assert calls == [0, 1] * (len(calls) // 2)


def test_one_copy_does_where_there_is_no_cache_to_pass_by() -> None:
    assert len(copies_of(Clock().example("one", 1), CPU)) == 1


@pytest.mark.gpu
def test_a_tile_is_measured_on_a_gpu() -> None:
    from infopt.kernels.gpu.examples import EXAMPLES

    device = torch.device("cuda")
    (example,) = (one for one in EXAMPLES if one.name == "integers, 16 tokens")
    card, few = Card.at_hand(device), replace(example, candidates=example.candidates[:2])
    assert len(copies_of(few, device)) > 1
    seconds = partial(replayed, device=device)
    found = measured_rules(card, [few], device, seconds, lambda _: None)
    (times,) = (rule["seconds"] for rule in found["integer_product"] if "seconds" in rule)
    assert 0 < times[example.name] < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(UnsupportedError):
        tune_tiles(lambda _: None)
