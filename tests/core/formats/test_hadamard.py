import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.core.formats import hadamard as module
from infopt.core.formats.hadamard import hadamard, rotation


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 700))
def test_what_is_called_hadamard_is(size: int) -> None:
    found = hadamard(size)
    if found is None:
        assert size & (size - 1), "every power of two has one"
        return
    assert found.shape == (size, size)
    assert bool((found.abs() == 1).all())
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(
    "size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 96, 128, 576, 768, 896, 960, 1536]
)
def test_the_sizes_of_known_models_have_one(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 7, 10, 14, 18, 52, 92, 100])
def test_where_no_construction_gives_one_there_is_none(size: int) -> None:
    assert hadamard(size) is None


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 130), seed=st.integers(0, 2**63 - 1))
def test_a_rotation_is_orthogonal_and_of_its_seed(size: int, seed: int) -> None:
    matrix = rotation(size, seed).matrix()
    assert matrix.dtype == torch.float64 and matrix.shape == (size, size)
    assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < 1e-12
    assert torch.equal(matrix, rotation(size, seed).matrix())
    if size > 30:
        assert not torch.equal(matrix, rotation(size, (seed + 1) % 2**63).matrix())


@pytest.mark.parametrize("size", [1, 7, 24, 64, 96])
def test_applied_by_parts_it_is_the_matrix_product(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    turn = rotation(size, 5)
    rows = torch.randn(3, 11, size, dtype=torch.float64, generator=generator)
    gain = torch.randn(size, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(module, "_CHUNK", 2 * size + 1)  # several chunks, and a rest
    assert torch.allclose(turn.apply(rows), rows @ turn.matrix(), atol=1e-12)
    assert torch.allclose(turn.apply(rows, gain), (rows * gain) @ turn.matrix(), atol=1e-12)
    assert turn.apply(rows.bfloat16()).dtype == torch.bfloat16
    half = turn.apply(rows.half())
    assert torch.equal(half, (turn.apply(rows.half().double())).half()), "rounded once"


@pytest.mark.parametrize("size", [64, 96, 576])
def test_one_outlier_is_spread_evenly(size: int) -> None:
    row = torch.zeros(1, size, dtype=torch.float64)
    row[0, 3] = 1000.0
    turned = rotation(size, 1).apply(row).abs()
    assert torch.allclose(turned, torch.full_like(turned, 1000.0 / size**0.5))
