"""A block whose inputs are scaled against its weights: the same function, statistics to match."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import batches, calibration_tokens
from infopt.core.compression.gather import gather
from infopt.core.compression.walk import Walk
from infopt.core.quantization.job import Job, resolve_job
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.scaling import Scaled, clips, scale_block
from infopt.core.recipe.quantize import QuantizeSettings

MakeLlama = Callable[..., Artifact]


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 8, "sequence_length": 32}
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu"}
    return QuantizeSettings.model_validate(values | changes)


def standing(artifact: Artifact, wanted: QuantizeSettings, block: int = 0) -> tuple[Walk, Job]:
    """A walk that has loaded a block, all before it unchanged."""
    job = resolve_job(artifact, wanted)
    tokens = calibration_tokens(artifact, wanted.calibration, wanted.seed)
    walk = Walk(job.artifact, tokens[:1], batches(tokens, 64), job.dtype, job.device)
    walk.start()
    walk.load()
    for _ in range(block):
        walk.advance()
        walk.load()
    return walk, job


def scaled(walk: Walk, job: Job, block: int = 0) -> tuple[list[tuple[str, ...]], Scaled]:
    groups = walk.input_groups(job.blocks[block].targets)
    return groups, scale_block(walk, block, groups, job)


def parameters(walk: Walk) -> dict[str, Tensor]:
    name = walk.names[walk.position]
    return {f"{name}.{k}": p.detach().clone() for k, p in walk.block.named_parameters()}


CASES: list[dict[str, Any]] = [
    {"method": "awq", "bits": 3, "group_size": 32},
    {"method": "awq", "bits": 4, "group_size": 32, "clip": False, "symmetric": True},
    {"method": "awq", "rounding": "gptq", "group_size": 32},
    {"method": "smoothquant", "alpha": 0.5},
    {"method": "smoothquant", "alpha": 0.9},
    {"method": "smoothquant", "scheme": "W4A4-int4", "group_size": 32},
    {"method": "smoothquant", "scheme": "W16A16", "alpha": 0.5},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("block", [0, 1])
def test_the_block_computes_what_it_did(
    make_llama: MakeLlama, calibration_file: Path, case: dict[str, Any], block: int
) -> None:
    walk, job = standing(make_llama(), settings(calibration_file, **case), block)
    before, expected = parameters(walk), walk.run_probe().clone()
    _, result = scaled(walk, job, block)
    found = walk.run_probe()
    # Layers that stay dense are rounded to bfloat16 again.
    bound = 0.01 if case.get("scheme") == "W16A16" else 1e-5
    assert float((found - expected).norm() / expected.norm()) < bound
    after = parameters(walk)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in moved if "norm" in name}
    assert norms, "the scales are in the norms"
    weights = {f"{target.name}.weight" for target in job.blocks[block].targets}
    if case.get("scheme") == "W16A16":
        assert result.changed >= moved
    else:
        assert result.changed >= norms
        assert not result.changed & weights, "targets are rounded, and stored by that"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_stays_dense_is_exact_in_the_dtype_it_is_stored_in(
    make_llama: MakeLlama, calibration_file: Path, case: dict[str, Any]
) -> None:
    walk, job = standing(make_llama(), settings(calibration_file, **case))
    _, result = scaled(walk, job)
    assert result.changed
    for name in result.changed:
        value = walk.model.get_parameter(name)
        assert torch.equal(value, value.to(torch.bfloat16).to(value.dtype)), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_statistics_are_those_of_the_inputs_as_they_are_now(
    make_llama: MakeLlama, calibration_file: Path, case: dict[str, Any]
) -> None:
    walk, job = standing(make_llama(), settings(calibration_file, **case))
    groups, result = scaled(walk, job)
    fresh = gather(walk, groups, ranges=True)
    assert result.statistics.keys() == fresh.keys()
    # Layers that stay dense are rounded to bfloat16, which what is behind them sees.
    share = 0.02 if case.get("scheme") == "W16A16" else 1e-4
    for group, statistics in fresh.items():
        known = result.statistics[group]
        for part in ("hessian", "abs_mean", "abs_max"):
            one, other = getattr(known, part), getattr(statistics, part)
            assert float((one - other).norm() / other.norm()) < share, (group, part)


def test_the_errors_of_rounding_are_those_of_the_layers_as_they_were(
    make_llama: MakeLlama, calibration_file: Path
) -> None:
    from infopt.core.compression.statistics import relative_error

    wanted = settings(calibration_file, method="awq", bits=3, group_size=32)
    walk, job = standing(make_llama(), wanted)
    groups = walk.input_groups(job.blocks[0].targets)
    before = gather(walk, groups)
    weights = {name: walk.layer(name).weight.clone() for group in groups for name in group}
    found = scale_block(walk, 0, groups, job).rtn_errors
    assert found.keys() == weights.keys()
    for group in groups:
        for name in group:
            form = job.schemes[name].weight
            grid = group_grids(weights[name], form, mse=True)  # type: ignore[arg-type]
            nearest = quantize_nearest(weights[name], form, grid).dequantize()  # type: ignore[arg-type]
            expected = relative_error(weights[name], nearest, before[group].hessian)
            assert found[name] == pytest.approx(expected)


def test_smoothing_evens_out_what_is_planted(make_llama: MakeLlama, calibration_file: Path) -> None:
    wanted = settings(calibration_file, method="smoothquant", alpha=0.5)
    walk, job = standing(make_llama(), wanted)
    with torch.no_grad():
        walk.model.get_parameter("model.layers.0.input_layernorm.weight")[5] *= 64
        for leaf in "qkv":
            walk.layer(f"model.layers.0.self_attn.{leaf}_proj").weight[:, 5] /= 64
    groups = walk.input_groups(job.blocks[0].targets)
    planted = gather(walk, groups[:1], ranges=True)[groups[0]].abs_max
    result = scale_block(walk, 0, groups, job)
    smoothed = result.statistics[groups[0]].abs_max
    assert planted is not None and smoothed is not None
    assert float(planted.max() / planted.median()) > 30
    assert float(smoothed.max() / smoothed.median()) < 4


def test_a_group_that_no_token_reached_is_left_alone(
    make_llama: MakeLlama, calibration_file: Path
) -> None:
    wanted = settings(calibration_file, method="awq", group_size=32)
    walk, job = standing(make_llama(), wanted)
    groups = walk.input_groups(job.blocks[0].targets)
    walk.tokens = walk.tokens[:1]
    before = parameters(walk)
    result = scale_block(walk, 0, groups, job)
    assert result.changed == set()
    assert all(torch.equal(before[name], value) for name, value in parameters(walk).items())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "awq"}, True),
        ({"method": "awq", "clip": False}, False),
        ({"method": "awq", "rounding": "gptq"}, False),
        ({"method": "smoothquant"}, False),
        ({"method": "rtn"}, False),
    ],
)
def test_whose_ranges_are_searched(values: dict[str, Any], expected: bool) -> None:
    assert clips(QuantizeSettings.model_validate(values)) is expected


@pytest.mark.parametrize(("method", "scaled_values"), [("smoothquant", True), ("awq", False)])
def test_values_of_grouped_queries_are_smoothed_and_awq_leaves_them(
    make_llama: MakeLlama, calibration_file: Path, method: str, scaled_values: bool
) -> None:
    walk, job = standing(make_llama(), settings(calibration_file, method=method))
    attention = f"{walk.names[0]}.self_attn"
    values, output = (walk.layer(f"{attention}.{leaf}_proj") for leaf in "vo")
    assert output.in_features == 2 * values.out_features, "what this is about"
    before = output.weight.detach().clone()
    scaled(walk, job)
    assert torch.equal(output.weight, before) != scaled_values
    if scaled_values:
        factors = (output.weight / before).median(dim=0).values.reshape(-1, 2, 16)
        assert torch.allclose(factors[:, 0], factors[:, 1]), "the heads of a group share them"
        assert float(factors.std()) > 0
