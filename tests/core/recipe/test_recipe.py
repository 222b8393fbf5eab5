"""Recipes: what is right is read as it was said, and what is wrong is told in one line."""

from enum import StrEnum
from pathlib import Path

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.bench import BenchSettings
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.recipe import dump_recipe, find_recipe, load_recipe, parse_recipe
from infopt.core.recipe.text import CalibrationSettings


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
        (steps({"quantize": {"symmetric": "yes"}}), ["symmetric", "boolean", "'yes'"]),
        (steps({"evaluate": {"chat": 1}}), ["chat", "boolean"]),
        (steps({"quantize": {"bits": "4"}}), ["bits", "'4'"]),
        (steps({"quantize": {"group_size": "32"}}), ["group_size", "'32'"]),
        (steps({"quantize": {"calibration": {"samples": "8"}}}), ["calibration.samples", "'8'"]),
        (steps({"quantize": {"damp_percent": "0.1"}}), ["damp_percent", "'0.1'"]),
        (steps({"quantize": {"ignore": "lm_head"}}), ["ignore", "'lm_head'"]),
        (steps({"serve": {"ask": [1]}}), ["ask.0", "string"]),
        (steps({"bench": {"requests": 4.0}}), ["requests", "integer"]),
        (steps({"bench": {"requests": True}}), ["requests", "integer"]),
        (steps({"bench": {"timeout": float("nan")}}), ["timeout", "finite"]),
        *(
            (steps({verb: {"seed": -5}}), ["seed", "-5", f"step 1 ({verb})"])
            for verb in ("quantize", "evaluate", "profile", "serve", "bench")
        ),
        *(
            (steps({"quantize": {"output": output}}), ["output", "one folder", "step 1"])
            for output in ("", " ", ".", "..", "a/b", "/tmp/a", "../a")
        ),
        ({"name": "../x", "steps": ["bench"]}, ["name", "one folder", "r.yaml"]),
        (
            steps({"quantize": {"output": "a"}}, "evaluate", {"quantize": {"output": "a"}}),
            ["steps 1 and 3", "r.yaml", "'a'"],
        ),
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
    assert EvaluateSettings.model_validate({"max_ppl_increase": "0.02"}).max_ppl_increase == 0.02
    for word in ("much%", "much"):
        with pytest.raises(RecipeError, match="percentage"):
            parse_recipe(steps({"evaluate": {"max_ppl_increase": word}}), "r.yaml")


def test_what_the_command_line_passes_is_taken() -> None:
    class Word(StrEnum):
        auto = "auto"
        cpu = "cpu"
        alias = "auto-gptq"

    found = QuantizeSettings.model_validate(
        {
            "method": Word.alias,
            "device": Word.cpu,
            "group_size": Word.auto,
            "ignore": ("a",),
            "calibration": {"samples": 2},
            "symmetric": False,
        }
    )
    assert found == QuantizeSettings(
        device="cpu",
        ignore=("a",),
        calibration=CalibrationSettings(samples=2),
        symmetric=False,
    )
    assert BenchSettings.model_validate({"timeout": 5}).timeout == 5.0


def test_auto_gptq_is_an_alias() -> None:
    assert QuantizeSettings.model_validate({"method": "auto-gptq"}).method == "gptq"


def test_a_file_that_is_not_yaml_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("steps: [\n")
    with pytest.raises(RecipeError, match=r"not valid YAML") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_key_said_twice_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("steps:\n- quantize:\n    bits: 4\n    method: rtn\n    bits: 8\n")
    with pytest.raises(RecipeError, match=r"'bits' is there twice, again in line 5 of .*twice"):
        load_recipe(file)


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text(
        "steps:\n- quantize: &q {bits: 4}\n- quantize: {<<: *q, bits: 8, model: default}\n"
    )
    bits = [step.settings.model_dump()["bits"] for step in load_recipe(file).steps]
    assert bits == [4, 8]


def test_a_date_that_is_none_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "date.yaml"
    file.write_text("name: 2024-99-99\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(file)


def test_shipped_recipes_are_found_by_name(tmp_path: Path) -> None:
    assert find_recipe("run/demo").name == "demo.yaml"
    with pytest.raises(RecipeError, match="run/demo"):
        find_recipe("run/dem")
