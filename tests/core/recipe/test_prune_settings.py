from typing import Any

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.base import validated
from infopt.core.recipe.prune import (
    Pattern,
    PruneSettings,
    parse_count,
    parse_pattern,
    parse_times,
    width_of,
)


def made(**values: Any) -> PruneSettings:
    return validated(PruneSettings, values, "the test")


@pytest.mark.parametrize(
    ("word", "pattern"),
    [
        ("0.5", Pattern(0.5)),
        ("50%", Pattern(0.5)),
        ("2:4", Pattern(0.5, 2, 4)),
        (" 1 : 4 ", Pattern(0.75, 1, 4)),
    ],
)
def test_a_sparsity_is_a_share_or_n_kept_of_every_m(word: str, pattern: Pattern) -> None:
    assert parse_pattern(word) == pattern


def test_one_sparsity_has_one_spelling() -> None:
    assert made(sparsity=0.5) == made(sparsity="0.50") == made(sparsity="50%") == made()
    assert made(sparsity="2 : 4").sparsity == "2:4" and made().method == "wanda"
    assert made(sparsity="2:4").pattern == Pattern(0.5, 2, 4)


@pytest.mark.parametrize("word", ["0.9999999", "33.3%", 1e-8, 0.123456789])
def test_a_share_is_read_as_it_was_written_down(word: str | float) -> None:
    found = made(sparsity=word)
    assert found.pattern == parse_pattern(str(word)) and 0 < found.pattern.share < 1
    assert PruneSettings.model_validate(found.model_dump(mode="json")) == found
    assert width_of(made(ffn="0.9999999x").ffn or 0, 1000) == 1000


@pytest.mark.parametrize(
    "word",
    ["0.9999999999", "1e-12", "1.2", 1.2, "0", 1, -0.1, "5:4", "0:4", "4:4", "half", "nan", ""],
)
def test_what_is_no_sparsity_is_refused_in_one_line(word: object) -> None:
    with pytest.raises(RecipeError, match="sparsity: ") as caught:
        made(sparsity=word)
    assert "\n" not in caught.value.message


def test_what_yaml_makes_of_two_of_four_is_answered_with_quotes() -> None:
    with pytest.raises(RecipeError, match="quote N:M in YAML, as '2:4'"):
        made(sparsity=124)


@pytest.mark.parametrize("key", ["layers", "heads", "ffn", "hidden", "params", "latency"])
def test_a_size_or_budget_means_structured(key: str) -> None:
    word: dict[str, Any] = {"params": "100M", "latency": "0.7x"}
    found = made(**{key: word.get(key, 8)})
    assert found.method == "structured" and found.sparsity is None


def test_words_for_sizes() -> None:
    assert parse_count("100M") == 100_000_000 and parse_count("1.2b") == 1_200_000_000
    assert parse_count(5) == 5 and made(params="90k").params == 90_000
    assert parse_times("0.7x") == parse_times(0.7) == made(latency="0.7x").latency == 0.7
    assert made(ffn="1152").ffn == made(ffn=1152).ffn == 1152
    assert made(ffn="0.750x").ffn == made(ffn=0.75).ffn == "0.75x"
    assert width_of("0.75x", 1536) == 1152 and width_of(96, 1536) == 96


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "structured"}, "what stays: layers, heads"),
        ({"method": "structured", "sparsity": 0.5, "layers": 4}, "sparsity is read by method mag"),
        ({"layers": 4, "sparsity": 0.5}, "sparsity is read by method magnitude, sparsegpt, wanda"),
        ({"method": "wanda", "layers": 4}, "layers is read by method structured only"),
        ({"method": "wanda", "damp_percent": 0.1}, "damp_percent is read by method sparsegpt"),
        ({"method": "magnitude", "true_sequential": False}, "true_sequential is read by method"),
        ({"params": "10M", "latency": "0.5x"}, "goes without latency"),
        ({"params": "10M", "ffn": 64}, "goes without ffn"),
        ({"layers": 4, "importance": "random"}, "only layers are removed"),
        ({"ffn": 64, "depth_importance": "random"}, "ranks layers, and none are removed"),
        ({"iterations": 2}, "iterations is read by method structured"),
        ({"learning_rate": 0.1}, "goes with retrain"),
        ({"retrain_from": "text"}, "goes with retrain"),
        ({"owl_spread": 0.1}, "owl_spread is read by allocation owl"),
        ({"allocation": "owl", "sparsity": "2:4"}, "2:4 fixes it"),
        ({"retrain": -1}, "retrain: "),
        ({"heads": 0}, "heads: "),
        ({"ffn": 0}, "ffn: at least 1 stays"),
        ({"hidden": "0"}, "hidden: at least 1 stays"),
        ({"hidden": 32, "iterations": 2}, "in the last round only"),
        ({"retrain": 5, "retrain_tokens": 100}, "100 retrain_tokens holds no window of 256"),
        ({"ffn": "1.5x"}, "between 0x and 1x"),
        ({"latency": 1.2}, "between 0x and 1x"),
        ({"params": "many"}, "no number of parameters"),
        ({"sparsty": 0.5}, "unknown key 'sparsty'"),
    ],
)
def test_what_contradicts_or_would_not_be_read_is_refused(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        made(**values)


def test_settings_survive_being_written_down() -> None:
    for found in (made(), made(sparsity="2:4", method="sparsegpt"), made(ffn="0.75x", layers=20)):
        assert PruneSettings.model_validate(found.model_dump(mode="json")) == found
