"""Chains whose order would destroy what was done, and those that are fine."""

from dataclasses import dataclass, field
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest

from infopt.core.errors import RecipeError
from infopt.core.recipe.order import check_order, kinds


@dataclass(frozen=True)
class Step:
    verb: str
    settings: object = field(default_factory=SimpleNamespace)
    model: str | None = None
    output: str | None = None


def quantize(method: str = "gptq", scheme: str | None = "W4A16", **rest: str) -> Step:
    return Step("quantize", SimpleNamespace(method=method, scheme=scheme), **rest)


ROTATE = quantize("rotate", "W16A16")
SMOOTH = quantize("smoothquant", "W16A16")
PRUNE, DISTILL, EVALUATE = Step("prune"), Step("distill"), Step("evaluate")
RIGHT = {"rotate": ROTATE, "smooth": SMOOTH, "prune": PRUNE, "distill": DISTILL}


def refusal(*steps: Step) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        check_order(steps, "r.yaml")
    return caught.value


def test_the_kind_of_a_step() -> None:
    assert kinds(ROTATE) == ("rotate",)
    assert kinds(SMOOTH) == ("smooth",)
    assert kinds(quantize()) == ("quantize",)
    assert kinds(Step("quantize")) == ("quantize",), "settings without method or scheme"
    assert kinds(quantize("rotate", "W4A4-int4")) == ("rotate", "quantize")
    assert kinds(quantize("smoothquant", "W8A8-int8")) == ("smooth", "quantize")
    assert kinds(EVALUATE) == ()


def test_the_right_order_passes_with_steps_between_that_only_read() -> None:
    check_order([EVALUATE, ROTATE, SMOOTH, EVALUATE, PRUNE, DISTILL, quantize(), EVALUATE], "r")
    check_order([PRUNE, SMOOTH, DISTILL, quantize("smoothquant", "W8A8-int8")], "r")
    check_order([], "r")


@pytest.mark.parametrize("order", list(permutations(RIGHT)))
def test_a_rotation_comes_before_what_it_would_destroy(order: tuple[str, ...]) -> None:
    steps = [RIGHT[kind] for kind in order]
    before = order[: order.index("rotate")]
    if {"smooth", "prune"} & set(before):
        assert "rotation" in refusal(*steps).message
    else:
        check_order(steps, "r")


@pytest.mark.parametrize("later", [ROTATE, SMOOTH, PRUNE, DISTILL, quantize(), quantize("awq")])
def test_nothing_changes_quantized_weights(later: Step) -> None:
    error = refusal(quantize(), EVALUATE, later)
    assert "step 3 of r.yaml" in error.message and "after step 1" in error.message
    assert "codes" in error.message
    assert error.hint


def test_the_refusal_says_what_is_lost_and_which_order_is_right() -> None:
    error = refusal(PRUNE, EVALUATE, ROTATE)
    assert error.message == (
        "step 3 of r.yaml (quantize: rotate) comes after step 1 (prune) on the same model: "
        "a rotation mixes the columns of a weight, so that its zeros are lost"
    )
    assert error.hint is not None and error.hint.startswith("put step 3 before step 1; ")
    words = [error.hint.index(w) for w in ("rotate", "smooth", "prune", "distill", "quantize")]
    assert all(a < b for a, b in pairwise(words))
    assert "undoes the smoothing" in refusal(SMOOTH, ROTATE).message


def test_a_step_that_rotates_and_rounds_is_checked_for_both() -> None:
    assert "zeros" in refusal(PRUNE, quantize("rotate", "W4A8-int8")).message
    assert "codes" in refusal(quantize("rotate", "W4A8-int8"), PRUNE).message
    check_order([ROTATE, quantize("smoothquant", "W8A8-int8")], "r")


def test_two_methods_on_the_original_are_no_contradiction() -> None:
    check_order([quantize(model="m", output="a"), quantize("awq", model="m", output="b")], "r")
    refusal(quantize(model="m", output="a"), quantize("awq"))


def test_a_step_goes_on_from_the_output_that_it_names() -> None:
    a, b = quantize(output="a"), Step("prune", model="m", output="b")
    check_order([a, b, quantize(model="b")], "r")
    assert "after step 1" in refusal(a, b, quantize(model="a")).message
    assert "after step 1" in refusal(quantize(), b, quantize(model="01-quantize")).message
    # The newest is b, whose way began anew.
    check_order([a, b, DISTILL, quantize()], "r")


def test_a_way_is_remembered_through_several_outputs() -> None:
    pruned = Step("prune", output="pruned")
    tuned = Step("distill", output="tuned")
    assert "after step 1" in refusal(pruned, tuned, quantize("rotate", "W16A16")).message
    check_order([ROTATE, pruned, tuned, quantize(output="q"), quantize("awq", model="tuned")], "r")
