"""8-bit keys and values: how far they are off, what they take, and what is never hidden."""

import pytest
import torch

from infopt.kernels.attention.cache import new_cache, token_bytes, write_kv
from infopt.kernels.attention.eight_bits import (
    FP8,
    INT8,
    KvScales,
    decode,
    encode,
    fill_with_noise,
    row_bytes,
)
from infopt.kernels.attention.paged import paged_attention, plan_attention, planned_attention

CPU = torch.device("cpu")
FORMS = {"int8": (torch.int8, INT8), "fp8": (torch.float8_e4m3fn, FP8)}
# Half a step of the largest magnitude; half of an e4m3's last bit, or of its smallest step.
BOUND = {"int8": 0.5 / 127, "fp8": 2.0**-4}


@pytest.mark.parametrize("head_dim", [8, 6])
@pytest.mark.parametrize("form", FORMS)
def test_an_error_is_at_most_half_a_step(form: str, head_dim: int) -> None:
    values = torch.randn(50, 4, head_dim) * 10.0 ** torch.randint(-3, 4, (50, 4, 1))
    back = decode(encode(values, FORMS[form][1], None), head_dim, torch.float32)
    amax = values.abs().amax(-1, keepdim=True)
    step = amax if form == "int8" else values.abs().maximum(amax * 2.0**-6 / 448)
    assert bool(((back - values).abs() <= BOUND[form] * step * 1.0001).all())
    torch.testing.assert_close(back.abs().amax(-1), amax.squeeze(-1))


def test_every_e4m3_comes_back_as_torch_has_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float()
    found = encode(codes.view(1, 1, -1), FP8, KvScales(FP8, torch.tensor([[1.0]])))
    assert torch.equal(decode(found, len(codes), torch.float32).flatten(), codes)


@pytest.mark.parametrize("form", FORMS)
def test_calibrated_scales_are_used_for_their_own_form_only(form: str) -> None:
    values = torch.randn(3, 4, 8)
    scales = torch.tensor([[0.5], [0.5], [0.25], [0.25]])
    other = {INT8: FP8, FP8: INT8}[FORMS[form][1]]
    storage = FORMS[form][1]
    rows = encode(values, storage, KvScales(storage, scales))
    assert torch.equal(rows[..., -4:].view(torch.float32), scales.expand(3, 4, 1))
    free = encode(values, storage, None)
    assert torch.equal(encode(values, storage, KvScales(other, scales)), free)
    assert not torch.equal(rows, free)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_so(form: str, fault: float, static: bool) -> None:
    values = torch.randn(2, 2, 8)
    values[1, 0, 3] = fault
    storage = FORMS[form][1]
    scales = KvScales(storage, torch.ones(2, 1)) if static else None
    back = decode(encode(values, storage, scales), 8, torch.float32)
    assert not bool(torch.isfinite(back[1, 0]).any())
    assert bool(torch.isfinite(back[[0, 0, 1], [0, 1, 1]]).all())


@pytest.mark.parametrize("form", FORMS)
def test_zeros_are_zeros_and_bytes_are_counted(form: str) -> None:
    dtype, storage = FORMS[form]
    assert not decode(encode(torch.zeros(1, 2, 6), storage, None), 6, torch.float32).any()
    cache = new_cache(4, 3, 2, 6, dtype, CPU)
    assert row_bytes(6) == 12 and cache.nbytes == 12 * token_bytes(2, 6, dtype) == 12 * 2 * 2 * 12
    fill_with_noise(cache)
    assert bool(torch.isfinite(decode(cache, 6, torch.bfloat16)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_attention_reads_what_was_written(form: str, dtype: torch.dtype) -> None:
    """Planned over 8 bits against plain over what they stand for."""
    torch.manual_seed(0)
    cache = new_cache(5, 4, 2, 8, FORMS[form][0], CPU)
    wide = new_cache(5, 4, 2, 8, dtype, CPU)
    tables, contexts, starts = [[3, 0], [1, 4, 2]], [7, 12], [0, 1, 6]
    for table, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([table[p // 4] * 4 + p % 4 for p in range(context)])
        key_value = torch.randn(context, 4, 8, dtype=dtype)
        write_kv(cache, key_value, slots)
        write_kv(wide, decode(encode(key_value, FORMS[form][1], None), 8, dtype), slots)
    query = torch.randn(6, 6, 8, dtype=dtype)
    padded = torch.tensor([[3, 0, 0], [1, 4, 2]])
    plain = paged_attention(query, wide[:, :, 0], wide[:, :, 1], padded, contexts, starts, 0.3)
    plan = plan_attention(tables, contexts, starts, 4, dtype, CPU)
    found = planned_attention(query, cache, plan.reads(), 0.3)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, plain, atol=tolerance, rtol=tolerance)
