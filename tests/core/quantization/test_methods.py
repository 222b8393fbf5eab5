"""Every method through the door, on tiny models: what is reported, written, read back, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.artifact.quantized import is_quantized, linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.compression import factor
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.models.hf import load_transformers
from infopt.core.quantization.plan import plan_quantize
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.schemes import BITS_OF, SCHEMES_OF

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]
SAMPLES, LENGTH = 16, 32
CASES: list[dict[str, Any]] = [
    {"method": method, "scheme": scheme}
    for method, schemes in SCHEMES_OF.items()
    for scheme in schemes
] + [{"method": "fp8", "fp8": kind} for kind in ("static", "block")]
SHORT: dict[str, dict[str, Any]] = {"qat": {"steps": 2}, "autoround": {"iterations": 2}}
"""So that a method that trains is done soon."""
CLOSE = {"W16A16": 1e-4, "W8A16": 0.08, "W8A8-int8": 0.12, "W8A8-fp8": 0.4}
"""By scheme: relative differences of the logits; this model's are some ten times a trained one's.
Measured 4e-7, 0.04, 0.06 and 0.2."""


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {
        "text": str(calibration_file),
        "samples": SAMPLES,
        "sequence_length": LENGTH,
    }
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu"}
    return QuantizeSettings.model_validate(values | changes)


def rewritten(source: Artifact, change: Callable[[dict[str, Tensor]], None]) -> Artifact:
    """The model with other weights, in float32."""
    file = source.path / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    change(tensors)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, file, metadata={"format": "pt"})
    return read_artifact(source.path)


def spread(tensors: dict[str, Tensor], std: float = 0.12) -> None:
    """Matrices so large that every block matters; transformers' own are nearly none."""
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        if tensors[name].ndim == 2:
            tensors[name] = std * torch.randn(tensors[name].shape, generator=generator)


@pytest.fixture
def make(make_llama: MakeLlama) -> MakeLlama:
    """A random Llama in float32 whose blocks matter."""
    return lambda name="tiny", **changes: rewritten(make_llama(name, **changes), spread)


@torch.no_grad()
def logits(artifact: Artifact) -> Tensor:
    model = load_transformers(artifact, torch.float32, CPU)
    found: Tensor = model(input_ids=torch.arange(3, 99)[None], use_cache=False).logits
    return found


def off(artifact: Artifact, expected: Tensor) -> float:
    """How far the artifact's logits are from those expected, as a share."""
    return float((logits(artifact) - expected).norm() / expected.norm())


def stored_bits(artifact: Artifact, layers: list[str]) -> float:
    """Bits per weight of these layers, counted over all that their names begin."""
    tensors = load_file(artifact.path / "model.safetensors")
    stored = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if any(name.startswith(f"{layer}.") for layer in layers)
    )
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    return 8 * stored / (2 * sum(rows * columns for rows, columns in shapes))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c.values()))
def test_every_method_makes_every_scheme_it_lists(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    # Blocks of 128 need layers of such sides.
    wide = {"hidden_size": 128} if case.get("fp8") == "block" else {}
    source = make(**wide)
    target = {"target_bits": 4.5} if case.get("scheme") == "mixed" else {}
    wanted = settings(calibration_file, **case, **target, **SHORT.get(case["method"], {}))
    report = quantize(source, tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    verify_manifest(written.path)
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"

    scheme = str(wanted.scheme)
    assert (report.method, report.scheme, report.format) == (case["method"], scheme, wanted.format)
    assert report.bits == BITS_OF.get(wanted.scheme or "W4A16")
    assert report.logits_max_difference <= 1e-4
    assert report.bytes == written.weight_bytes and report.original_bytes == source.weight_bytes
    assert report.seconds > 0 and report.peak_memory_bytes > 2**20
    assert off(written, logits(source)) < CLOSE.get(scheme, 2.0)

    layers = [row.name for row in report.layers]
    if scheme == "W16A16":
        assert layers == [] and written.quantization is None
        assert report.bits_per_weight == 32.0, "dense, as it was stored"
        return
    assert len(layers) == len(set(layers)) == 14
    assert written.quantization is not None
    if not wide:
        assert report.bits_per_weight == pytest.approx(stored_bits(written, layers), rel=1e-12)
    for row in report.layers:
        assert is_quantized(written, row.name)
        assert 0 < row.error < 2 and row.rtn_error > 0 and row.fallback is None
        assert row.bits == report.bits or scheme == "mixed"
        assert str(row.bits) in row.scheme and (" inputs " in row.scheme) == (
            "A16" not in scheme and scheme not in ("NF4", "mixed")
        )
    if scheme in ("W8A16", "W8A8-int8"):
        assert max(row.error for row in report.layers) < 1e-3


OBSERVING = [
    {"method": "gptq"},
    {"method": "awq"},
    {"method": "smoothquant"},
    {"method": "fp8", "fp8": "static"},
    {"method": "rotate"},
    {"method": "rotate", "format": "compressed-tensors"},
    {"method": "autoround", "iterations": 2},
    {"method": "qat", "steps": 2},
]
BLIND = [
    {"method": "rtn"},
    {"method": "nf4"},
    {"method": "llm-int8"},
    {"method": "fp8"},
    {"method": "rotate", "scheme": "W16A16"},
    {"method": "rotate", "rounding": "rtn", "format": "compressed-tensors"},
]


@pytest.mark.parametrize("case", [*OBSERVING, *BLIND], ids=lambda c: "-".join(map(str, c.values())))
def test_the_report_tells_what_text_was_seen(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    report = quantize(make(), tmp_path / "out", settings(calibration_file, **case))
    assert report.calibration_tokens == (SAMPLES * LENGTH if case in OBSERVING else 0)
    if case["method"] != "qat":  # its layers learn together
        assert {row.tokens for row in report.layers} <= {report.calibration_tokens}


@pytest.mark.parametrize(
    "case",
    [{"method": m, **SHORT.get(m, {})} for m in SCHEMES_OF if m != "rotate"]
    + [{"method": "rotate", "format": "compressed-tensors"}],
    ids=lambda c: c["method"],
)
def test_the_report_tells_how_long_each_layer_took(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    report = quantize(make(), tmp_path / "out", settings(calibration_file, **case))
    assert all(row.seconds > 0 for row in report.layers)
    assert sum(row.seconds for row in report.layers) < report.seconds


POISONED = [
    {"method": "awq"},
    {"method": "smoothquant"},
    {"method": "smoothquant", "scheme": "W16A16"},
    {"method": "llm-int8"},
    {"method": "nf4"},
    {"method": "fp8"},
    {"method": "autoround"},
    {"method": "rotate"},
    {"method": "rotate", "scheme": "W16A16"},
    {"method": "qat"},
    {"target_bits": 4.0},
    {"max_ppl_increase": "1%"},
]


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 3] = float("nan")

    source = rewritten(make(), poison)
    before = set(tmp_path.iterdir())
    with pytest.raises(NumericsError, match=name):
        quantize(source, tmp_path / "out", settings(calibration_file, **case))
    assert set(tmp_path.iterdir()) == before


def degenerate(tensors: dict[str, Tensor]) -> None:
    """A column that is the same in every row, one of zeros, one row of zeros, a layer of zeros."""
    tensors["model.layers.0.self_attn.q_proj.weight"][:, 7] = 0.25
    tensors["model.layers.0.self_attn.k_proj.weight"][:, 9] = 0.0
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 0.0
    tensors["model.layers.1.mlp.gate_proj.weight"].zero_()


@pytest.mark.parametrize(
    "case",
    [
        {"method": "rtn"},
        {"method": "rtn", "symmetric": False, "grid": "minmax"},
        {"method": "gptq"},
        {"method": "gptq", "gptaq": 0.25, "symmetric": False, "act_order": False},
        {"method": "awq"},
        {"method": "awq", "clip": False, "symmetric": True},
        {"method": "smoothquant"},
        {"method": "smoothquant", "alpha": 0.5},
        {"method": "smoothquant", "scheme": "W16A16"},
        {"method": "llm-int8"},
        {"method": "nf4"},
        {"method": "nf4", "double_quant": False},
        {"method": "fp8"},
        {"method": "fp8", "fp8": "static"},
        {"method": "autoround", "iterations": 2},
        {"method": "rotate", "scheme": "W4A8-int8"},
        {"method": "qat", "steps": 2},
        {"target_bits": 4.0},
        {"kv_cache": "int8"},
    ],
    ids=str,
)
def test_constant_columns_and_layers_of_zeros_do_no_harm(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    source = rewritten(make(), degenerate)
    report = quantize(source, tmp_path / "out", settings(calibration_file, **case))
    written = read_artifact(tmp_path / "out")
    assert bool(torch.isfinite(logits(written)).all())
    assert report.logits_max_difference <= 1e-4
    rows = {row.name: row for row in report.layers}
    assert all(0 <= row.error < 1 for row in rows.values())
    name = "model.layers.1.mlp.gate_proj"
    zero = linear_weight(written, name)
    dense = zero if isinstance(zero, Tensor) else zero.dequantize()
    assert not dense.any() and (not rows or rows[name].error == 0.0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"group_size": 128}, UsageError, "128 does not divide the 64 input columns"),
        ({"method": "awq", "group_size": 128}, UsageError, "128 does not divide the 64"),
        ({"method": "fp8", "fp8": "block"}, UnsupportedError, "128 do not divide its 64 inputs"),
        ({"bits": 3, "format": "awq"}, UnsupportedError, "awq has integers of 4 bits"),
        ({"bits": 3, "format": "compressed-tensors"}, UnsupportedError, "3 bits"),
        ({"method": "nf4", "format": "gptq"}, UnsupportedError, "gptq has integers"),
        ({"method": "smoothquant", "format": "gptq"}, UnsupportedError, "no rounded inputs"),
        ({"method": "llm-int8", "kv_cache": "int8"}, UnsupportedError, "outliers"),
        ({"method": "rtn", "format": "bitsandbytes"}, UnsupportedError, "bitsandbytes has NF4"),
        ({"kv_cache": "int8", "format": "gptq"}, UnsupportedError, "no place for the scales"),
        ({"ignore": ("lm_head", "model.layers.0.mlp.upproj")}, UsageError, "upproj"),
        ({"method": "nf4", "ignore": ("*.q_prj",)}, UsageError, "'\\*.q_proj'"),
        ({"ignore": ("*_proj",)}, UsageError, "no linear layer"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    make: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    source = make()
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=words):
        quantize(source, tmp_path / "out", settings(calibration_file, **changes))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", list(SCHEMES_OF))
def test_a_tied_head_stays_tied_unless_it_must_not(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, method: str
) -> None:
    source = make()
    form = {"format": "compressed-tensors"} if method == "rotate" else {}
    case = settings(calibration_file, method=method, **form, **SHORT.get(method, {}))
    report = quantize(source, tmp_path / "out", case)
    written = read_artifact(tmp_path / "out")
    untied = method == "rotate"
    assert written.has("lm_head.weight") == untied
    assert written.config["tie_word_embeddings"] is not untied
    assert any("the head shared" in warning for warning in report.warnings) == untied
    name = "model.embed_tokens.weight"
    assert torch.equal(written.tensor(name), source.tensor(name)) == (not untied)


def test_a_hessian_that_is_no_more_than_its_tokens_climbs_the_ladder(
    make: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    """32 tokens span no 64 columns: nothing but the damping holds the matrix up."""
    few = {"text": str(calibration_file), "samples": 1, "sequence_length": 32}
    report = quantize(
        make(), tmp_path / "out", settings(calibration_file, damp_percent=1e-9, calibration=few)
    )
    assert all(row.damp > 1e-9 for row in report.layers)
    assert {row.fallback for row in report.layers} == {"damping raised to 0.02"}
    assert report.warnings == ("14 layers: damping raised to 0.02",)


@pytest.mark.parametrize("case", [{}, {"method": "awq", "rounding": "gptq"}], ids=str)
def test_no_cholesky_factor_at_all_means_rounding_and_is_told(
    make: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: dict[str, Any],
) -> None:
    monkeypatch.setattr(factor, "_factor", lambda *_: None)
    source = make()
    report = quantize(source, tmp_path / "out", settings(calibration_file, **case))
    told = "rtn: the Hessian has no Cholesky factor"
    assert {row.fallback for row in report.layers} == {told}
    assert report.warnings == (f"14 layers: {told}",)
    if not case:
        quantize(source, tmp_path / "rtn", settings(calibration_file, method="rtn"))
        one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "rtn"))
        assert all(torch.equal(one[name], other[name]) for name in one)


CACHING = [
    {"method": m, **SHORT.get(m, {}), **({"format": "compressed-tensors"} if m == "rotate" else {})}
    for m in SCHEMES_OF
] + [{"target_bits": 4.0, "mixed_bits": (4, 8)}]


@pytest.mark.parametrize("case", CACHING, ids=str)
def test_scales_of_a_cache_are_written_or_refused_before_any_work(
    make: MakeLlama, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    source = make()
    try:
        wanted = settings(calibration_file, kv_cache="int8", **case)
        plan_quantize(source, wanted)
    except (ValueError, UnsupportedError) as refusal:
        assert "kv_cache" in str(refusal) or "cannot hold" in str(refusal)
        return
    report = quantize(source, tmp_path / "out", wanted)
    assert report.kv_cache == "int8" and report.calibration_tokens == SAMPLES * LENGTH
    written = read_artifact(tmp_path / "out")
    for layer in range(2):
        for side in ("k_scale", "v_scale"):
            scale = written.tensor(f"model.layers.{layer}.self_attn.{side}")
            assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    assert written.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


def test_the_recipe_beside_the_weights_makes_them_again(
    make: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    from infopt.core.recipe.recipe import load_recipe

    source = make()
    wanted = settings(calibration_file, method="awq", rounding="gptq", group_size=32, seed=4)
    quantize(source, tmp_path / "one", wanted)
    again = load_recipe(tmp_path / "one" / "recipe.yaml").steps[0].settings
    assert again == wanted and isinstance(again, QuantizeSettings)
    quantize(source, tmp_path / "two", again)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
