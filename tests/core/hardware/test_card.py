"""Tiles that were measured on a card are found again, and only where they hold."""

from pathlib import Path

import pytest
import torch

from infopt.core.hardware.card import (
    MeasuredTiles,
    card_of,
    compiler_versions,
    load_tiles,
    store_tiles,
    tiles_file,
)

RULE = {"when": {"m": [1, 16]}, "constants": {"N": 64}, "warps": 4, "stages": 3, "seconds": 1e-5}
MADE = MeasuredTiles(device="a card", versions="1", kernels={"k": (RULE,)})


def test_tiles_are_found_again(tmp_path: Path) -> None:
    assert store_tiles(MADE, cache=tmp_path) == tiles_file("a card", cache=tmp_path)
    found = load_tiles("a card", "1", cache=tmp_path)
    assert found == MADE
    (rule,) = found.rules()["k"]
    assert rule.applies({"m": 16}) and not rule.applies({"m": 17})
    assert rule.tile.options() == {"N": 64, "num_warps": 4, "num_stages": 3}


def test_those_of_other_compilers_say_nothing(tmp_path: Path) -> None:
    store_tiles(MADE, cache=tmp_path)
    assert load_tiles("a card", "2", cache=tmp_path).kernels == {}
    assert load_tiles("another", "1", cache=tmp_path).kernels == {}


@pytest.mark.parametrize(
    "text", ["{", '{"device": "a card", "versions": "1", "kernels": {"k": [{}]}}']
)
def test_a_damaged_file_says_nothing(tmp_path: Path, text: str) -> None:
    store_tiles(MADE, cache=tmp_path).write_text(text)
    assert load_tiles("a card", "1", cache=tmp_path).kernels == {}


@pytest.mark.gpu
def test_the_card_at_hand(tmp_path: Path) -> None:
    bare = card_of(torch.device("cuda"), cache=tmp_path)
    assert bare.capability >= 80 and bare.processors > 0 and bare.shared_bytes >= 98_304
    record = MeasuredTiles(device=bare.name, versions=compiler_versions(), kernels={"k": (RULE,)})
    store_tiles(record, cache=tmp_path)
    assert card_of(torch.device("cuda"), cache=tmp_path).tile("k", m=3).constants == {"N": 64}
