"""Settings of a quantization: what was left out follows, what contradicts or is unread is told."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from infopt.cli.options import Common
from infopt.cli.verb import settings_for
from infopt.core.errors import RecipeError
from infopt.core.recipe.base import validated
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe, load_recipe
from infopt.core.recipe.schemes import SCHEMES_OF, Method

METHODS: tuple[Method, ...] = get_args(Method)


def settings(**values: Any) -> QuantizeSettings:
    return QuantizeSettings.model_validate(values)


def refusal(values: dict[str, Any]) -> str:
    """The one line that a user reads."""
    with pytest.raises(RecipeError) as caught:
        validated(QuantizeSettings, values, "the command line")
    line = str(caught.value)
    assert "\n" not in line and "the command line" in line
    return line


@pytest.mark.parametrize(
    ("values", "scheme", "bits", "symmetric", "rounding", "form"),
    [
        ({}, "W4A16", 4, True, None, "gptq"),
        ({"bits": 3}, "W3A16", 3, True, None, "gptq"),
        ({"scheme": "W8A16"}, "W8A16", 8, True, None, "gptq"),
        ({"scheme": "W4A8-int8"}, "W4A8-int8", 4, True, None, "compressed-tensors"),
        ({"method": "awq"}, "W4A16", 4, False, "rtn", "awq"),
        ({"method": "awq", "bits": 8}, "W8A16", 8, True, "rtn", "gptq"),
        ({"method": "awq", "symmetric": True}, "W4A16", 4, True, "rtn", "awq"),
        ({"method": "awq", "target_bits": 3.5}, "mixed", None, False, "rtn", "gptq"),
        ({"method": "awq", "rounding": "gptq"}, "W4A16", 4, False, "gptq", "awq"),
        ({"method": "smoothquant"}, "W8A8-int8", 8, True, "gptq", "compressed-tensors"),
        ({"method": "smoothquant", "scheme": "W16A16"}, "W16A16", None, True, None, None),
        ({"method": "llm-int8"}, "W8A8-int8", 8, True, None, "bitsandbytes"),
        ({"method": "nf4"}, "NF4", 4, True, None, "bitsandbytes"),
        ({"method": "fp8"}, "W8A8-fp8", 8, True, None, "compressed-tensors"),
        ({"method": "fp8", "fp8": "block"}, "W8A8-fp8", 8, True, None, "fp8"),
        ({"method": "autoround", "bits": 2}, "W2A16", 2, True, None, "gptq"),
        ({"method": "rotate"}, "W4A16", 4, True, "gptq", "gptq"),
        ({"method": "rotate", "scheme": "W16A16"}, "W16A16", None, True, None, None),
        ({"method": "qat", "bits": 2}, "W2A16", 2, True, None, "gptq"),
        ({"max_ppl_increase": "1%"}, "mixed", None, True, None, "gptq"),
        ({"kv_cache": "fp8"}, "W4A16", 4, True, None, "compressed-tensors"),
        ({"format": "compressed-tensors"}, "W4A16", 4, True, None, "compressed-tensors"),
    ],
)
def test_what_is_left_out_follows_from_the_rest(
    values: dict[str, Any],
    scheme: str,
    bits: int | None,
    symmetric: bool,
    rounding: str | None,
    form: str | None,
) -> None:
    found = settings(**values)
    assert (found.scheme, found.bits, found.symmetric) == (scheme, bits, symmetric)
    assert (found.rounding, found.format) == (rounding, form)


@pytest.mark.parametrize(
    ("values", "how"),
    [
        ({}, "gptq"),
        ({"method": "rtn"}, "rtn"),
        ({"method": "awq"}, "rtn"),
        ({"method": "awq", "rounding": "autoround"}, "autoround"),
        ({"method": "rotate"}, "gptq"),
        ({"method": "rotate", "rounding": "rtn"}, "rtn"),
        ({"method": "nf4"}, "nf4"),
        ({"method": "fp8"}, "fp8"),
        ({"method": "qat"}, "qat"),
    ],
)
def test_how_weights_are_rounded(values: dict[str, Any], how: str) -> None:
    assert settings(**values).how == how


def test_words_that_mean_the_same() -> None:
    assert settings(method="auto-gptq").method == settings(method="auto_gptq").method == "gptq"
    assert settings(max_ppl_increase="1%").max_ppl_increase == 0.01
    assert settings(method="smoothquant", alpha=1).alpha == 1.0


CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"scheme": "W4A16", "bits": 3}, ["W4A16", "bits 3"]),
    ({"method": "nf4", "bits": 8}, ["nf4", "NF4", "8 bits"]),
    ({"method": "awq", "scheme": "W8A8-int8"}, ["awq", "W8A8-int8", "smoothquant"]),
    ({"method": "fp8", "scheme": "W4A16"}, ["fp8", "W8A8-fp8", "gptq"]),
    ({"method": "gptq", "scheme": "W16A16"}, ["gptq", "W16A16", "rotate"]),
    ({"method": "fp8", "target_bits": 4.0}, ["fp8", "mixed"]),
    ({"method": "nf4", "max_ppl_increase": "1%"}, ["nf4", "mixed"]),
    ({"scheme": "mixed"}, ["mixed", "target_bits", "max_ppl_increase"]),
    ({"scheme": "W4A16", "target_bits": 4.0}, ["mixed", "target_bits"]),
    ({"target_bits": 4.0, "bits": 4}, ["mixed", "bits 4"]),
    ({"target_bits": 4.0, "max_ppl_increase": "1%"}, ["target_bits", "max_ppl_increase"]),
    ({"target_bits": 9.0}, ["target_bits", "9.0"]),
    ({"target_bits": 1.0}, ["target_bits", "1.0"]),
    ({"target_bits": 2.5}, ["target_bits", "2.5", "mixed_bits"]),
    ({"target_bits": 5.0, "mixed_bits": (2, 3, 4)}, ["target_bits", "5", "mixed_bits"]),
    ({"gptaq": 0.25, "calibrate_all_experts": False}, ["gptaq", "calibrate_all_experts"]),
    ({"target_bits": 4.0, "mixed_bits": (4,)}, ["mixed_bits", "2 items"]),
    ({"target_bits": 4.0, "mixed_bits": (3, 5)}, ["mixed_bits.1", "5"]),
    ({"max_ppl_increase": "-1%"}, ["max_ppl_increase"]),
    ({"max_ppl_increase": "some"}, ["max_ppl_increase", "some"]),
    ({"method": "smoothquant", "alpha": 1.5}, ["alpha", "1.5"]),
    ({"method": "smoothquant", "alpha": -0.1}, ["alpha", "-0.1"]),
    ({"method": "smoothquant", "alpha": "most"}, ["alpha", "most"]),
    ({"gptaq": 1.5}, ["gptaq", "1.5"]),
    ({"damp_percent": 0.0}, ["damp_percent"]),
    ({"method": "llm-int8", "threshold": 0.0}, ["threshold"]),
    ({"method": "qat", "steps": 0}, ["steps"]),
    ({"method": "qat", "learning_rate": 0.0}, ["learning_rate"]),
    ({"method": "autoround", "iterations": 0}, ["iterations"]),
    ({"method": "quip"}, ["method", "'quip'", "'gptq'"]),
    ({"scheme": "W5A16"}, ["scheme", "'W5A16'"]),
    ({"format": "gguf"}, ["format", "'gguf'"]),
    ({"scheme": "W8A8-int8", "symmetric": False}, ["W8A8-int8", "symmetric"]),
    ({"scheme": "W4A8-int8", "symmetric": False}, ["W4A8-int8", "symmetric"]),
    ({"scheme": "W4A4-int4", "symmetric": False}, ["W4A4-int4", "symmetric"]),
    ({"method": "llm-int8", "symmetric": False}, ["symmetric"]),
]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=lambda v: str(v)[:60])
def test_contradictions_are_refused_with_what_contradicts(
    values: dict[str, Any], words: list[str]
) -> None:
    line = refusal(values)
    assert [word for word in words if word not in line] == []


CHANGED: dict[str, Any] = {
    "rounding": "autoround",
    "act_order": False,
    "damp_percent": 0.02,
    "true_sequential": False,
    "gptaq": 0.25,
    "clip": False,
    "alpha": 0.5,
    "threshold": 2.0,
    "double_quant": False,
    "fp8": "static",
    "iterations": 20,
    "steps": 7,
    "learning_rate": 0.01,
    "mixed_bits": (3, 4),
    "group_size": 32,
    "grid": "minmax",
    "symmetric": False,
    "offload": "disk",
}
_GRIDDED = {"group_size", "grid", "symmetric"}
_GPTQ = {"act_order", "damp_percent", "true_sequential", "gptaq"}
READ: dict[str, set[str]] = {
    "rtn": _GRIDDED,
    "gptq": _GRIDDED | _GPTQ | {"offload"},
    # A range that is searched by the error of the outputs is of no given kind.
    "awq": (_GRIDDED - {"grid"}) | {"clip", "rounding", "offload"},
    "smoothquant": {"grid", "alpha", "rounding", "offload"} | _GPTQ - {"gptaq"},
    "llm-int8": {"grid", "threshold"},
    "nf4": {"double_quant"},
    "fp8": {"fp8"},
    "autoround": _GRIDDED | {"iterations", "offload"},
    "rotate": _GRIDDED | _GPTQ | {"rounding", "offload"},
    "qat": _GRIDDED | {"steps", "learning_rate", "offload"},
}
"""What each method reads with all else at its default."""


@pytest.mark.parametrize("option", CHANGED)
@pytest.mark.parametrize("method", METHODS)
def test_an_option_is_read_or_refused_by_name(method: Method, option: str) -> None:
    values = {"method": method, option: CHANGED[option]}
    if method == "awq" and option == "symmetric":
        values[option] = True  # False is what it takes by itself
    if option in READ[method]:
        assert getattr(settings(**values), option) == values[option]
    else:
        assert option in refusal(values)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "awq", "clip": False, "grid": "minmax"},
        {"method": "awq", "rounding": "gptq", "grid": "minmax"},
        {"method": "awq", "rounding": "gptq", "act_order": False},
        {"method": "rotate", "gptaq": 0.25},
        {"method": "awq", "rounding": "autoround", "iterations": 3},
        {"method": "smoothquant", "scheme": "W4A8-int8", "group_size": 32},
        {"method": "smoothquant", "rounding": "rtn", "grid": "minmax"},
        {"method": "rotate", "rounding": "autoround", "iterations": 3},
        {"method": "rotate", "scheme": "W16A16", "seed": 3},
        {"method": "smoothquant", "scheme": "W16A16", "alpha": 0.5},
        {"target_bits": 3.5, "mixed_bits": (3, 4)},
        {"method": "fp8", "fp8": "static", "calibrate_all_experts": False},
        {"method": "rtn", "kv_cache": "int8", "offload": "disk"},
    ],
    ids=str,
)
def test_what_is_read_after_another_choice_is_taken(values: dict[str, Any]) -> None:
    found = settings(**values)
    assert {key: getattr(found, key) for key in values} == values


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"method": "awq", "rounding": "gptq", "clip": False}, "clip"),
        ({"method": "awq", "rounding": "gptq", "iterations": 3}, "iterations"),
        ({"method": "awq", "grid": "minmax"}, "grid"),
        ({"method": "rotate", "rounding": "rtn", "gptaq": 0.25}, "gptaq"),
        ({"method": "rotate", "rounding": "rtn", "act_order": False}, "act_order"),
        ({"method": "smoothquant", "rounding": "rtn", "damp_percent": 0.1}, "damp_percent"),
        # Scaled inputs are no longer those of the original model.
        ({"method": "awq", "rounding": "gptq", "gptaq": 0.25}, "gptaq"),
        ({"method": "smoothquant", "rounding": "gptq", "gptaq": 0.25}, "gptaq"),
        ({"mixed_bits": (3, 4)}, "mixed_bits"),
        ({"scheme": "W8A8-int8", "group_size": 32}, "group_size"),
        ({"method": "llm-int8", "group_size": 64}, "group_size"),
        ({"method": "rotate", "scheme": "W16A16", "offload": "disk"}, "offload"),
        ({"method": "rtn", "calibrate_all_experts": False}, "calibrate_all_experts"),
        ({"method": "nf4", "calibrate_all_experts": False}, "calibrate_all_experts"),
        ({"method": "fp8", "calibrate_all_experts": False}, "calibrate_all_experts"),
        ({"method": "llm-int8", "calibrate_all_experts": False}, "calibrate_all_experts"),
    ],
    ids=str,
)
def test_what_is_not_read_after_another_choice_is_refused(
    values: dict[str, Any], option: str
) -> None:
    assert option in refusal(values)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rounding", "rtn"),
        ("format", "gptq"),
        ("kv_cache", "int8"),
        ("group_size", 32),
        ("grid", "minmax"),
        ("symmetric", False),
        ("act_order", False),
        ("damp_percent", 0.02),
        ("gptaq", 0.25),
        ("true_sequential", False),
        ("iterations", 3),
        ("mixed_bits", (3, 4)),
    ],
)
@pytest.mark.parametrize("method", ["rotate", "smoothquant"])
def test_what_stays_dense_reads_nothing_of_rounding(method: str, option: str, value: Any) -> None:
    assert option in refusal({"method": method, "scheme": "W16A16", option: value})


ALL = [
    {"method": method, "scheme": scheme, **({"target_bits": 4.0} if scheme == "mixed" else {})}
    for method, schemes in SCHEMES_OF.items()
    for scheme in schemes
]


@pytest.mark.parametrize("values", ALL, ids=lambda v: f"{v['method']}-{v['scheme']}")
def test_settings_written_out_are_the_same_settings(values: dict[str, Any], tmp_path: Path) -> None:
    found = settings(**values, seed=3, calibration={"samples": 4})
    assert QuantizeSettings.model_validate(found.model_dump()) == found
    file = tmp_path / "recipe.yaml"
    recipe = Recipe(name="r", steps=(Step(verb="quantize", settings=found),))
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file).steps[0].settings == found


@pytest.mark.parametrize("values", [v for v in ALL if v["scheme"] != "mixed"], ids=str)
def test_what_follows_may_also_be_said(values: dict[str, Any]) -> None:
    found = settings(**values)
    keys = ("bits", "rounding", "format", "symmetric")
    said = {key: getattr(found, key) for key in keys if getattr(found, key) is not None}
    if found.scheme == "W16A16":
        del said["symmetric"]
    assert settings(**values, **said) == found


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        settings().bits = 3


def step_file(folder: Path, **values: Any) -> Path:
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "r", "steps": [{"quantize": values}]}))
    return file


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ({"bits": 3}, {}, {"method": "gptq", "bits": 3, "scheme": "W3A16"}),
        ({"bits": 3}, {"bits": 8}, {"bits": 8, "scheme": "W8A16"}),
        (
            {"method": "gptq"},
            {"method": "nf4"},
            {"method": "nf4", "scheme": "NF4", "format": "bitsandbytes"},
        ),
        (
            {"method": "awq"},
            {"method": "gptq"},
            {"symmetric": True, "rounding": None, "format": "gptq"},
        ),
        ({"method": "rtn"}, {"kv_cache": "int8"}, {"format": "compressed-tensors"}),
        ({"bits": 3, "ignore": ["a"]}, {"ignore": ("b",)}, {"ignore": ("b",), "bits": 3}),
    ],
    ids=str,
)
def test_options_override_a_recipe_and_what_follows_follows_anew(
    tmp_path: Path, recipe: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    common = Common(recipe=step_file(tmp_path, **recipe))
    found, step = settings_for("quantize", common, given)
    assert {key: getattr(found, key) for key in expected} == expected
    assert step is not None and step.verb == "quantize"


def test_options_override_single_keys_of_the_calibration(tmp_path: Path) -> None:
    file = step_file(tmp_path, calibration={"samples": 4, "sequence_length": 64}, seed=5)
    common = Common(recipe=file, seed=9)
    found, _ = settings_for("quantize", common, {"calibration": {"samples": 8}})
    assert isinstance(found, QuantizeSettings)
    assert (found.calibration.samples, found.calibration.sequence_length) == (8, 64)
    assert found.seed == 9


@pytest.mark.parametrize(
    ("recipe", "given", "words"),
    [
        ({"scheme": "W4A16"}, {"bits": 3}, ["W4A16", "bits 3"]),
        ({"method": "gptq", "gptaq": 0.25}, {"method": "rtn"}, ["gptaq", "rtn"]),
        ({"target_bits": 3.5}, {"max_ppl_increase": "1%"}, ["target_bits", "max_ppl_increase"]),
    ],
    ids=str,
)
def test_options_that_contradict_the_recipe_are_refused(
    tmp_path: Path, recipe: dict[str, Any], given: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        settings_for("quantize", Common(recipe=step_file(tmp_path, **recipe)), given)
    assert [word for word in words if word not in str(caught.value)] == []
