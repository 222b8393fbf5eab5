from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.compression.targets import Target, find_targets
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError, UsageError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.progress import Progress
from infopt.core.quantization.autoround import TunedBlock, autoround_block
from infopt.core.quantization.nearest import group_grids, quantize_nearest

CPU = torch.device("cpu")
Make = Callable[..., Artifact]
FORMS = [
    IntegerFormat(2, False, 32),
    IntegerFormat(2, True, 32),
    IntegerFormat(3, False, None),
    IntegerFormat(4, True, 64),
]


class Block:
    """The first block of a tiny model, loaded, with what it computes unquantized."""

    def __init__(self, artifact: Artifact, count: int = 6, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(1)
        data = torch.randint(1, 256, (count, 16), generator=generator)
        self.walk = Walk(artifact, data[:1], data.split(2), dtype, CPU)
        self.walk.start()
        self.targets: tuple[Target, ...] = find_targets(self.walk.model, ("lm_head",))[0].targets
        self.walk.load()
        with torch.no_grad():
            self.expected = [self.walk.run(i + 1, {}) for i in range(len(data.split(2)))]

    def weight(self, name: str) -> Tensor:
        return self.walk.layer(name).weight.detach()

    def tuned(self, form: IntegerFormat, **options: Any) -> TunedBlock:
        settings: dict[str, Any] = {"iterations": 40, "batch": 4} | options
        forms = {target.name: form for target in self.targets}
        return autoround_block(self.walk, self.targets, forms, self.expected, **settings)

    def nearest(self, form: IntegerFormat) -> dict[str, QuantizedWeight]:
        weights = {target.name: self.weight(target.name) for target in self.targets}
        return {
            name: quantize_nearest(weight, form, group_grids(weight, form, mse=True))
            for name, weight in weights.items()
        }

    @torch.no_grad()
    def error(self, weights: dict[str, QuantizedWeight]) -> float:
        """Of the block with these weights, relative to its power."""
        stand_ins = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
        outputs = [self.walk.run(i + 1, stand_ins) for i in range(len(self.expected))]
        lost = sum(
            float((y - e).square().sum()) for y, e in zip(outputs, self.expected, strict=True)
        )
        return lost / sum(float(e.square().sum()) for e in self.expected)


@pytest.fixture
def block(make_llama: Make) -> Block:
    return Block(make_llama(initializer_range=0.15))


@pytest.mark.parametrize("form", FORMS)
def test_tuning_beats_rounding_to_nearest(block: Block, form: IntegerFormat) -> None:
    result = block.tuned(form)
    assert block.error(result.weights) < 0.9 * block.error(block.nearest(form))
    assert result.error == pytest.approx(block.error(result.weights), rel=1e-4)
    assert result.nearest_error == pytest.approx(block.error(block.nearest(form)), rel=1e-4)
    assert 0 < result.iteration <= 40
    for name, weight in result.weights.items():
        assert weight.format == form and weight.codes.shape == block.weight(name).shape
        assert int(weight.codes.max()) <= form.max_code
        zeros = weight.zeros
        if form.symmetric:
            assert bool((zeros == form.middle).all())
        else:
            assert int(zeros.min()) >= 1 and int(zeros.max()) <= form.max_code


def test_without_iterations_it_is_rounding_to_nearest(block: Block) -> None:
    for form in FORMS:
        result, nearest = block.tuned(form, iterations=0), block.nearest(form)
        assert result.iteration == 0 and result.error == result.nearest_error
        for name, weight in result.weights.items():
            for part in ("codes", "scales", "zeros"):
                assert torch.equal(getattr(weight, part), getattr(nearest[name], part)), part


def test_what_gets_worse_is_not_kept(block: Block) -> None:
    """Trained towards the negative of its output, the block only departs from it."""
    form = FORMS[0]
    block.expected = [-value for value in block.expected]
    block.walk.hidden[1:] = [torch.zeros_like(value) for value in block.walk.hidden[1:]]
    result = block.tuned(form, iterations=6)
    assert result.iteration == 0
    for name, weight in block.nearest(form).items():
        assert torch.equal(result.weights[name].codes, weight.codes)


def test_offsets_move_a_code_by_one_at_most(block: Block) -> None:
    """Where the ranges are as they were, a code is the one below a weight or the one above."""
    form = IntegerFormat(4, True, 64)
    result, nearest = block.tuned(form, iterations=20), block.nearest(form)
    compared = 0
    for name, weight in result.weights.items():
        same = weight.scales == nearest[name].scales
        steps = block.weight(name).reshape(*same.shape, -1) / nearest[name].scales[..., None]
        codes = weight.codes.reshape(steps.shape).float() - 8
        away = (codes - steps.clamp(-8, 7)).abs()[same]
        assert float(away.max() if away.numel() else 0) <= 1.0 + 1e-3
        compared += away.numel()
    changed = sum(int((w.codes != nearest[n].codes).sum()) for n, w in result.weights.items())
    assert changed > 0 and compared > 0


def test_it_repeats_and_leaves_the_block_as_it_was(block: Block) -> None:
    before = {target.name: block.weight(target.name).clone() for target in block.targets}
    first, second = block.tuned(FORMS[0], iterations=8), block.tuned(FORMS[0], iterations=8)
    other = block.tuned(FORMS[0], iterations=8, seed=9)
    for name, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[name].codes)
        assert torch.equal(block.weight(name), before[name])
    assert any(not torch.equal(w.codes, other.weights[n].codes) for n, w in first.weights.items())
    assert all(parameter.grad is None for parameter in block.walk.block.parameters())


def test_inputs_may_be_rounded_too(block: Block) -> None:
    form = FORMS[3]
    four = {target.name: ActivationFormat("int", 4) for target in block.targets}
    plain, both = block.tuned(form, iterations=0), block.tuned(form, activations=four)
    assert both.nearest_error > plain.nearest_error, "rounding inputs costs something"
    assert both.error < both.nearest_error
    name = block.targets[0].name
    with block.walk.layer(name).register_forward_pre_hook(
        lambda _, args: (round_inputs(args[0], four[name]),)
    ):
        one = block.error(block.nearest(form))
    only = block.tuned(form, iterations=0, activations={name: four[name]})
    assert only.error == pytest.approx(one, rel=1e-4)


def test_some_layers_may_be_left_out(block: Block) -> None:
    block.targets = block.targets[:1]
    result = block.tuned(FORMS[0])
    assert list(result.weights) == [block.targets[0].name]
    assert result.error <= result.nearest_error


def test_bfloat16_and_progress(make_llama: Make) -> None:
    block = Block(make_llama(initializer_range=0.15), dtype=torch.bfloat16)
    seen: list[Progress] = []
    result = block.tuned(FORMS[0], progress=seen.append)
    assert result.error < 0.95 * result.nearest_error
    assert [progress.done for progress in seen] == list(range(40))
    assert seen[-1].note.endswith("of the error of rounding to nearest")


def test_no_text_and_broken_values_are_told(block: Block) -> None:
    poisoned = block.walk.hidden[1].clone()
    poisoned[0, 3, 5] = torch.nan
    block.walk.hidden[1] = poisoned
    with pytest.raises(NumericsError, match=r"layers\.0 computes values that are not finite"):
        block.tuned(FORMS[0])
    with pytest.raises(UsageError, match="calibration text"):
        autoround_block(block.walk, block.targets, {}, [])


def test_each_layer_may_have_its_own_format(block: Block) -> None:
    forms = {t.name: replace(FORMS[0], bits=2 + i % 3) for i, t in enumerate(block.targets)}
    result = autoround_block(
        block.walk, block.targets, forms, block.expected, iterations=8, batch=4
    )
    assert {name: weight.format for name, weight in result.weights.items()} == forms
    assert result.error < result.nearest_error
