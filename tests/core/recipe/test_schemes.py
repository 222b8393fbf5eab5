"""What follows from a method, and which of its options nobody would read."""

from typing import Any, get_args

import pytest

from infopt.core.recipe.schemes import (
    BITS_OF,
    CHOOSING,
    ROUNDING_OF,
    SCHEMES_OF,
    Format,
    Method,
    Scheme,
    check_scheme,
    default_format,
    default_scheme,
    unread_option,
)

METHODS: tuple[Method, ...] = get_args(Method)
PAIRS = [(method, scheme) for method, schemes in SCHEMES_OF.items() for scheme in schemes]


def test_every_method_and_every_scheme_has_its_place() -> None:
    assert set(SCHEMES_OF) == set(ROUNDING_OF) == set(METHODS)
    made = {scheme for schemes in SCHEMES_OF.values() for scheme in schemes}
    assert made == set(get_args(Scheme))
    assert made - set(BITS_OF) == {"mixed", "W16A16"}, "all others say how wide a weight is"
    assert set(METHODS) > CHOOSING


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_makes_unasked_is_something_it_makes(method: Method) -> None:
    scheme = default_scheme(method, None, mixed=False)
    assert scheme in SCHEMES_OF[method]
    check_scheme(method, scheme, None)


@pytest.mark.parametrize(
    ("method", "bits", "scheme"),
    [
        ("gptq", None, "W4A16"),
        ("gptq", 3, "W3A16"),
        ("rtn", 8, "W8A16"),
        ("awq", 2, "W2A16"),
        ("smoothquant", None, "W8A8-int8"),
        ("smoothquant", 4, "W4A8-int8"),
        ("llm-int8", 8, "W8A8-int8"),
        ("nf4", 4, "NF4"),
        ("fp8", 8, "W8A8-fp8"),
        ("rotate", 4, "W4A16"),
        ("qat", 2, "W2A16"),
    ],
)
def test_bits_choose_among_a_methods_schemes(
    method: Method, bits: int | None, scheme: Scheme
) -> None:
    assert default_scheme(method, bits, mixed=False) == scheme
    assert default_scheme(method, bits, mixed=True) == "mixed"


@pytest.mark.parametrize(
    ("method", "bits"), [("nf4", 3), ("nf4", 8), ("fp8", 4), ("llm-int8", 4), ("smoothquant", 2)]
)
def test_bits_that_a_method_does_not_make_are_answered_with_those_it_does(
    method: Method, bits: int
) -> None:
    with pytest.raises(ValueError, match=f"method {method} makes .*not {bits} bits") as caught:
        default_scheme(method, bits, mixed=False)
    assert SCHEMES_OF[method][0] in str(caught.value)


@pytest.mark.parametrize(
    ("method", "scheme"),
    [(m, s) for m in METHODS for s in get_args(Scheme) if s not in SCHEMES_OF[m]],
)
def test_a_scheme_of_others_is_refused_with_its_makers(method: Method, scheme: Scheme) -> None:
    with pytest.raises(ValueError, match=f"method {method} makes ") as caught:
        check_scheme(method, scheme, None)
    told = str(caught.value).partition(f"; {scheme} is made by ")[2].split(", ")
    assert told == [m for m in METHODS if scheme in SCHEMES_OF[m]]


@pytest.mark.parametrize(("scheme", "bits"), [("W4A16", 3), ("mixed", 4), ("W8A8-int8", 4)])
def test_a_scheme_and_other_bits_contradict(scheme: Scheme, bits: int) -> None:
    with pytest.raises(ValueError, match=f"scheme {scheme} contradicts bits {bits}"):
        check_scheme("rtn", scheme, bits)


READERS: dict[str, set[Method]] = {
    "rounding": {"awq", "smoothquant", "rotate"},
    "clip": {"awq"},
    "alpha": {"smoothquant"},
    "threshold": {"llm-int8"},
    "double_quant": {"nf4"},
    "fp8": {"fp8"},
    "steps": {"qat"},
    "learning_rate": {"qat"},
    "act_order": {"gptq", "smoothquant", "rotate"},
    "damp_percent": {"gptq", "smoothquant", "rotate"},
    "gptaq": {"gptq", "rotate"},
    "true_sequential": {"gptq", "smoothquant", "rotate"},
    "iterations": {"autoround"},
    "symmetric": set(METHODS) - {"nf4", "fp8"},
    "group_size": set(METHODS) - {"nf4", "fp8", "smoothquant", "llm-int8"},
    # AWQ's ranges are searched by the error of the outputs, unless clip is off.
    "grid": set(METHODS) - {"nf4", "fp8", "awq"},
}
"""Who reads an option by its defaults."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", READERS)
def test_an_option_that_a_method_does_not_read_is_named(method: Method, option: str) -> None:
    scheme = default_scheme(method, None, mixed=False)
    # Integers of both sides have no zeros of their own, which is another refusal.
    value: Any = True if option == "symmetric" else "changed"
    problem = unread_option(method, ROUNDING_OF[method], scheme, {option: value})
    if method in READERS[option]:
        assert problem is None
    else:
        assert problem is not None and problem.startswith(option)
        assert "\n" not in problem


@pytest.mark.parametrize(
    ("option", "readers"),
    [("damp_percent", {"gptq"}), ("act_order", {"gptq"}), ("iterations", {"autoround"})],
)
@pytest.mark.parametrize("method", sorted(CHOOSING))
def test_what_is_read_follows_the_rounding_that_was_chosen(
    method: Method, option: str, readers: set[str]
) -> None:
    for rounding in ("rtn", "gptq", "autoround"):
        problem = unread_option(method, rounding, "W4A16", {option: 1})
        assert (problem is None) == (rounding in readers)


@pytest.mark.parametrize(
    ("method", "scheme", "option"),
    [
        ("gptq", "W4A16", "mixed_bits"),
        ("gptq", "W8A8-int8", "group_size"),
        *(
            (method, "W16A16", option)
            for method in ("rotate", "smoothquant")
            for option in ("rounding", "kv_cache", "format", "group_size", "grid", "symmetric")
        ),
        *(
            ("rotate", "W16A16", option)
            for option in ("act_order", "damp_percent", "gptaq", "true_sequential")
        ),
    ],
)
def test_what_a_scheme_leaves_no_use_for_is_named(
    method: Method, scheme: Scheme, option: str
) -> None:
    problem = unread_option(method, ROUNDING_OF[method], scheme, {option: True})
    assert problem is not None and problem.startswith(option)


def test_awq_reads_the_grid_where_it_does_not_search_ranges() -> None:
    assert unread_option("awq", "rtn", "W4A16", {"grid": "minmax", "clip": False}) is None
    assert unread_option("awq", "gptq", "W4A16", {"grid": "minmax"}) is None


def test_clip_is_read_where_weights_are_rounded_to_nearest() -> None:
    assert unread_option("awq", "rtn", "W4A16", {"clip": False}) is None
    assert "not by gptq" in str(unread_option("awq", "gptq", "W4A16", {"clip": False}))


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_inputs_that_are_scaled_are_not_the_original_models(method: Method) -> None:
    assert "original model" in str(unread_option(method, "gptq", "W4A8-int8", {"gptaq": 0.25}))
    assert unread_option("rotate", "gptq", "W4A8-int8", {"gptaq": 0.25}) is None


@pytest.mark.parametrize("scheme", ["W4A4-int4", "W4A8-int8", "W8A8-int8"])
def test_integers_of_both_sides_are_symmetric(scheme: Scheme) -> None:
    assert unread_option("rtn", "rtn", scheme, {"symmetric": True}) is None
    assert "symmetric cannot be false" in str(
        unread_option("rtn", "rtn", scheme, {"symmetric": False})
    )


@pytest.mark.parametrize(
    ("method", "scheme", "options", "expected"),
    [
        ("gptq", "W4A16", {}, "gptq"),
        ("gptq", "mixed", {}, "gptq"),
        ("awq", "W4A16", {}, "awq"),
        ("awq", "W3A16", {}, "gptq"),
        ("awq", "mixed", {}, "gptq"),
        ("rtn", "W8A8-int8", {}, "compressed-tensors"),
        ("rtn", "W4A4-int4", {}, "compressed-tensors"),
        ("smoothquant", "W8A8-int8", {}, "compressed-tensors"),
        ("llm-int8", "W8A8-int8", {}, "bitsandbytes"),
        ("nf4", "NF4", {}, "bitsandbytes"),
        ("fp8", "W8A8-fp8", {"fp8": "dynamic"}, "compressed-tensors"),
        ("fp8", "W8A8-fp8", {"fp8": "static"}, "compressed-tensors"),
        ("fp8", "W8A8-fp8", {"fp8": "block"}, "fp8"),
        ("fp8", "W8A8-fp8", {"fp8": "block", "kv_cache": "fp8"}, "compressed-tensors"),
        ("gptq", "W4A16", {"kv_cache": "int8"}, "compressed-tensors"),
        ("rotate", "W16A16", {}, None),
        ("smoothquant", "W16A16", {}, None),
    ],
)
def test_the_format_is_one_that_holds_the_scheme(
    method: Method, scheme: Scheme, options: dict[str, Any], expected: Format | None
) -> None:
    assert default_format(method, scheme, options) == expected


@pytest.mark.parametrize(("method", "scheme"), PAIRS)
def test_only_what_stays_dense_has_no_format(method: Method, scheme: Scheme) -> None:
    found = default_format(method, scheme, {})
    assert (found is None) == (scheme == "W16A16")
    assert found is None or found in get_args(Format)
