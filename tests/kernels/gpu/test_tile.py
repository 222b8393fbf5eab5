"""Tables of tiles."""

import json

import pytest

from infopt.kernels.gpu.tile import A100, H100, Card, Rule, Tile, power_of_two, rules_from, shipped

TABLE = {
    "kernels": {
        "k": [
            {
                "when": {"m": [1, 16], "dtype": "int8"},
                "constants": {"N": 64},
                "warps": 4,
                "stages": 3,
            },
            {"when": {"m": [17, None]}, "constants": {"N": 128}, "warps": 8, "stages": 2},
            {"constants": {"N": 32}, "warps": 2, "stages": 1},
        ]
    }
}


@pytest.fixture
def card() -> Card:
    return Card("a card", 90, 132, 1000, rules_from(json.dumps(TABLE)))


def test_the_first_rule_that_applies_is_taken(card: Card) -> None:
    assert card.tile("k", m=16, dtype="int8").options() == {
        "N": 64,
        "num_warps": 4,
        "num_stages": 3,
    }
    assert card.tile("k", m=17, dtype="int8").constants == {"N": 128}
    assert card.tile("k", m=16, dtype="bfloat16").constants == {"N": 32}


def test_preferred_rules_come_before_the_cards_own(card: Card) -> None:
    own = Tile({"N": 8}, 1, 1)
    found = card.preferring({"k": [Rule({"m": 5}, own)], "other": [Rule({}, own)]})
    assert found.tile("k", m=5, dtype="int8") is own
    assert found.tile("k", m=6, dtype="int8").constants == {"N": 64}
    assert found.tile("other") is own


def test_a_kernel_without_a_rule_is_told(card: Card) -> None:
    with pytest.raises(KeyError):
        card.tile("unknown")


@pytest.mark.parametrize("facts", [H100, A100], ids=lambda facts: facts["name"])
def test_a_tile_that_was_written_is_read_again(facts: dict[str, int]) -> None:
    for rules in shipped(facts["capability"], facts["shared_bytes"]).values():
        for rule in rules:
            assert Rule.from_json({"when": rule.when, **rule.tile.as_json()}) == rule


def test_powers_of_two() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert power_of_two(3, least=16) == 16
