"""The settings of `infopt distill`: what they say, and what they refuse."""

from typing import Any

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.base import validated
from infopt.core.recipe.distill import DistillSettings, StudentShape, shape_of
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe
from infopt.core.recipe.train import TrainSettings


def made(**values: Any) -> DistillSettings:
    return validated(DistillSettings, {"student": "layers=1", **values}, "here")


def test_a_shape_is_read_from_words() -> None:
    assert shape_of("layers=6,hidden=0.5x, ffn=.25x,heads=3") == StudentShape(6, 0.5, 0.25, 3)
    assert shape_of("layers=1x") == StudentShape(layers=1.0)
    for model in ("default", "folder/layers=6", "owner/name"):
        assert shape_of(model) is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("layer=6", "did you mean 'layers'"),
        ("layers=6,layers=5", "twice"),
        ("layers=0", "no size"),
        ("ffn=1.5x", "no size"),
        ("hidden=half", "no size"),
        ("layers=", "no size"),
    ],
)
def test_a_wrong_shape_is_refused(word: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        made(student=word)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"student": None}, "the student is missing"),
        ({"student": "a-model", "student_init": "random"}, "student_init"),
        ({"beta": 0.1}, "beta is not read"),
        ({"loss": "jsd", "beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.2}, "alpha"),
        ({"alpha": 0.0, "loss": "jsd"}, "loss is not read where alpha is 0"),
        ({"alpha": 0.0, "temperature": 2.0}, "temperature is not read"),
        ({"alpha": 0.0, "on_policy": 0.5}, "on_policy is not read"),
        ({"sequence_temperature": 0.0}, "sequence_temperature"),
        ({"on_policy": 0.5, "sequence_level": True}, "second half"),
        ({"top_k": 8, "loss": "reverse-kl"}, "forward-kl alone"),
        ({"top_k": 8, "on_policy": 0.5}, "on_policy needs the teacher at every step"),
        ({"top_k": 8, "hidden_weight": 1.0}, "hidden_weight needs the teacher"),
        ({"attention_weight": 1.0, "gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"medusa_heads": 2}, "student is not read"),
        ({"medusa_vocabulary": 9}, "medusa_vocabulary is not read without medusa_heads"),
        (
            {"medusa_heads": 2, "student": None, "medusa_vocabulary": 9},
            "medusa_vocabulary is for medusa_projection: own",
        ),
        ({"medusa_heads": 2, "student": None, "alpha": 0.5}, "alpha is not read"),
        ({"medusa_layers": 2}, "without medusa_heads"),
        ({"medusa_start": "copy"}, "without medusa_heads"),
        ({"medusa_heads": 2, "student": None, "medusa_start": "copy"}, "medusa_projection: own"),
        ({"medusa_heads": 0, "student": None}, "medusa_heads"),
        ({"steps": 0}, "steps"),
        ({"stepz": 5}, "did you mean 'steps'"),
    ],
    ids=str,
)
def test_what_is_not_read_or_contradicts_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        made(**values)
    assert said in str(caught.value)


def test_a_named_teacher_needs_no_named_student() -> None:
    assert made(student=None, teacher="default").student is None
    assert made(student=None, medusa_heads=3).medusa_heads == 3


def test_the_training_is_a_part_of_it_and_a_recipe_says_it_all() -> None:
    settings = made(steps=7, learning_rate=1e-3, patience=2)
    assert settings.train == TrainSettings(steps=7, learning_rate=1e-3, patience=2)
    dumped = settings.model_dump(mode="json")
    assert validated(DistillSettings, dumped, "again") == settings
    recipe = dump_recipe(Recipe(name="r", steps=(Step(verb="distill", settings=settings),)))
    assert "student: layers=1" in recipe and "learning_rate: 0.001" in recipe
