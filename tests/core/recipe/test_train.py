from typing import Any

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.base import validated
from infopt.core.recipe.train import TrainSettings


def test_what_is_left_out_follows() -> None:
    settings = TrainSettings(steps=200)
    assert settings.evaluation_interval == 20
    assert TrainSettings(steps=3).evaluation_interval == 1
    assert TrainSettings(steps=200, evaluate_every=7).evaluation_interval == 7
    assert TrainSettings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": 1, "micro_tokens": 8192}, "more than batch_tokens"),
        ({"steps": 1, "sequence_length": 8192}, "holds no window"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 1, "warm_up": 1.0}, "warm_up"),
        ({"steps": 1, "patience": 0}, "patience"),
        ({"steps": 1, "precision": "float16"}, "precision"),
        ({"steps": 1, "learning_rat": 0.1}, "did you mean 'learning_rate'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validated(TrainSettings, values, "the command line")
    line = str(caught.value)
    assert words in line and "\n" not in line
