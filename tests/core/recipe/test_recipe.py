"""Recipes: what is right is read as it was said, and what is wrong is told in one line."""

from pathlib import Path

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.recipe import dump_recipe, find_recipe, load_recipe, parse_recipe


def steps(*items: object) -> dict[str, object]:
    return {"name": "x", "steps": list(items)}


def test_a_recipe_keeps_the_order_of_its_steps() -> None:
    recipe = parse_recipe(
        steps({"quantize": {"bits": 3, "output": "w3"}}, {"evaluate": None}, "bench"), "r.yaml"
    )
    assert [step.verb for step in recipe.steps] == ["quantize", "evaluate", "bench"]
    assert isinstance(recipe.steps[0].settings, QuantizeSettings)
    assert recipe.steps[0].settings.bits == 3
    assert recipe.steps[0].output == "w3"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            steps({"quantize": {"bit": 3}}),
            ["'bit'", "r.yaml, step 1 (quantize)", "did you mean 'bits'"],
        ),
        (
            steps({"quantize": {"calibration": {"sample": 3}}}),
            ["'sample'", "did you mean 'samples'"],
        ),
        (steps({"quantise": {}}), ["'quantise'", "did you mean 'quantize'"]),
        (steps({"quantize": {"bits": 5}}), ["bits", "2, 3, 4 or 8", "5", "step 1"]),
        (steps({"quantize": {"group_size": 48}}), ["group_size", "32, 64, 128", "48"]),
        (steps({"evaluate": {"output": "x"}}), ["'output'", "step 1 (evaluate)"]),
        (steps({"evaluate": {}}, {"bench": {"concurrency": 0}}), ["concurrency", "step 2 (bench)"]),
        ({"stepz": []}, ["'stepz'", "did you mean 'steps'"]),
        ({"steps": []}, ["no steps"]),
        (["quantize"], ["not a recipe"]),
        (steps({"quantize": 4}), ["mapping"]),
        (steps({"quantize": {}, "bench": {}}), ["not a step"]),
    ],
)
def test_a_mistake_is_told_with_its_place(content: object, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content, "r.yaml")
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in line
    for word in words:
        assert word in line


def test_every_setting_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = parse_recipe(
        steps(
            {
                "quantize": {
                    "method": "auto-gptq",
                    "group_size": "channel",
                    "ignore": ["lm_head", "*.down_proj"],
                }
            },
            {"evaluate": {"max_ppl_increase": "2%", "baseline": "default"}},
            {"serve": {"ask": ["Who?"]}},
        ),
        "r.yaml",
    )
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_shares_are_numbers_or_percentages() -> None:
    assert EvaluateSettings.model_validate(
        {"max_ppl_increase": "2%"}
    ).max_ppl_increase == pytest.approx(0.02)
    assert EvaluateSettings.model_validate(
        {"max_ppl_increase": 0.02}
    ).max_ppl_increase == pytest.approx(0.02)
    with pytest.raises(RecipeError, match="percentage"):
        parse_recipe(steps({"evaluate": {"max_ppl_increase": "much%"}}), "r.yaml")


def test_auto_gptq_is_an_alias() -> None:
    assert QuantizeSettings.model_validate({"method": "auto-gptq"}).method == "gptq"


def test_a_file_that_is_not_yaml_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("steps: [\n")
    with pytest.raises(RecipeError, match=r"not valid YAML") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_shipped_recipes_are_found_by_name(tmp_path: Path) -> None:
    assert find_recipe("run/demo").name == "demo.yaml"
    with pytest.raises(RecipeError, match="run/demo"):
        find_recipe("run/dem")
