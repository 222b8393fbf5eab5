import pytest
import torch

from infopt.core.formats.activation import ActivationFormat, input_steps, round_inputs

FORMATS = {
    "int8 by token": ActivationFormat("int"),
    "int4 by token": ActivationFormat("int", bits=4),
    "int8 by tensor": ActivationFormat("int", strategy="tensor"),
    "int8 by group": ActivationFormat("int", strategy="group", group_size=16),
    "fp8 by token": ActivationFormat("float"),
    "fp8 by group": ActivationFormat("float", strategy="group", group_size=32),
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("columns", [64, 72], ids=["whole groups", "a short group"])
def test_the_error_is_at_most_half_a_step(form: ActivationFormat, columns: int) -> None:
    x = torch.randn(3, 5, columns)
    rounded = round_inputs(x, form)
    assert rounded.shape == x.shape and not torch.equal(rounded, x)
    step = x.abs().amax() / form.largest
    # A step of e4m3 is at most 1/8 of the value itself; below its normal range it is fixed.
    bound = step / 2 if form.kind == "int" else (x.abs() / 16).clamp(min=float(step) * 2**-9)
    # The grid ends half a step below the largest magnitude that it is scaled to.
    assert bool(((rounded - x).abs() <= bound * 1.001).all())
    twice = round_inputs(rounded, form)
    assert (twice - rounded).abs().max() <= step


def test_each_token_has_its_own_scale() -> None:
    x = torch.randn(4, 32) * torch.tensor([[1.0], [10.0], [100.0], [0.01]])
    together = round_inputs(x, ActivationFormat("int"))
    assert all(
        torch.equal(together[i], round_inputs(x[i : i + 1], ActivationFormat("int"))[0])
        for i in range(4)
    )


def test_a_static_scale_cuts_what_is_beyond_it() -> None:
    form = ActivationFormat("int", strategy="tensor", dynamic=False)
    rounded = round_inputs(torch.tensor([[0.2, 0.3, 100.0, -100.0]]), form, torch.tensor([0.25]))
    assert rounded.tolist() == [[0.25, 0.25, 127 * 0.25, -128 * 0.25]]
    fp8 = ActivationFormat("float", strategy="tensor", dynamic=False)
    assert round_inputs(torch.tensor([1e6, -1e6]), fp8, torch.tensor(2.0)).tolist() == [896, -896]


def test_an_outlier_is_kept_and_its_neighbours_are_rounded() -> None:
    form = ActivationFormat("int", outlier_threshold=6.0)
    x = torch.tensor([[1.0, 0.3, 60.0], [1.0, 0.3, 5.0]])
    rounded = round_inputs(x, form)
    assert rounded[0, 2] == 60.0
    # The outlier has no say in the scale of its row, and its column is rounded in the other row.
    assert rounded[0, 0] == 1.0 and abs(float(rounded[0, 1]) - 0.3) <= 0.5 / 127
    torch.testing.assert_close(rounded[1], torch.tensor([5 / 127 * n for n in (25, 8, 127)]))
    assert torch.equal(round_inputs(x[:1], form)[0], rounded[0])


def test_rows_of_zeros_stay_zero() -> None:
    for form in FORMATS.values():
        assert torch.equal(round_inputs(torch.zeros(2, 64), form), torch.zeros(2, 64))
    steps, scale = input_steps(torch.zeros(2, 64), ActivationFormat("int"))
    assert bool((steps == 0).all()) and bool((scale == 1).all())


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_what_is_not_finite_stays_so(form: ActivationFormat) -> None:
    x = torch.zeros(1, 64)
    x[0, 3] = torch.nan
    assert bool(round_inputs(x, form).isnan().any())


def test_the_inputs_are_left_alone_and_keep_their_dtype() -> None:
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    before = x.clone()
    assert round_inputs(x, ActivationFormat("int")).dtype == torch.bfloat16
    assert torch.equal(x, before)
