from typing import Any

import pytest

from infopt.core.errors import UsageError
from infopt.core.runtime.request import SamplingParams


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 11.0},
        {"logit_bias": tuple((n, 1.0) for n in range(1025))},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, 100.5),)},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"prompt_logprobs": 21},
        {"seed": -1},
        {"logprobs": -1},
        {"logprobs": 21},
        {"n": 0},
        {"n": 129},
        {"priority": 2**31},
        {"stop": ("",)},
        {"stop": "word"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        SamplingParams(**values)


def test_an_unknown_parameter_is_never_ignored() -> None:
    with pytest.raises(TypeError):
        SamplingParams(typical_p=0.1)  # type: ignore[call-arg]
