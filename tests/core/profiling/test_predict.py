"""Predictions: by hand where peaks speak, by interpolation and fit where kernels were measured."""

import math

import numpy as np
import pytest

from infopt.core.hardware.kernel_times import (
    KernelTimes,
    LayerTime,
    ProductTime,
    StepTime,
    load_kernel_times,
    product_seconds,
    store_kernel_times,
)
from infopt.core.profiling.predict import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    Speed,
    critical_batch,
    nonnegative_fit,
    predict,
)
from infopt.core.profiling.shape import ModelShape, shape_of
from infopt.core.profiling.static import static_profile
from infopt.core.reports.profile import StaticProfile

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
H100 = Speed(989e12, 3350e9)


def static(shape: ModelShape, context: int, batch: int = 1) -> StaticProfile:
    return static_profile(
        shape,
        dtype="bfloat16",
        batch=batch,
        prompt_tokens=context - 32,
        context=context,
        device_memory=80 * 10**9,
    )


def test_the_critical_batch_is_the_formulas() -> None:
    """Llama-3.1-8B on an H100: there is none from some 400 tokens on, for a token's cache."""
    shape = shape_of(LLAMA_8B)
    short, long = static(shape, 128), static(shape, 1024)
    found = predict(shape, short, H100)
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    flops = short.decode.flops
    expected = weights / 3350e9 / (flops / 989e12 - 128 * 131072 / 3350e9)
    assert found.critical_batch == pytest.approx(expected, rel=0.001)
    assert critical_batch(shape, long, H100, 131072) is None
    assert 300 < found.critical_context < 450


def test_by_peaks_an_operator_takes_the_longer_of_bytes_and_flops() -> None:
    shape = shape_of(LLAMA_8B)
    profile = static(shape, 1024)
    found = predict(shape, profile, H100)
    assert found.source == "roofline"
    assert found.tpot_s == pytest.approx(profile.decode.bytes / 3350e9 / BANDWIDTH_SHARE, rel=0.001)
    assert found.decode_bound == "memory" and found.prefill_bound == "compute"
    assert found.ttft_s > profile.prefill.flops / 989e12 / COMPUTE_SHARE
    assert found.output_tokens_per_s == pytest.approx(1 / found.tpot_s)


def times(form: str, rate: float) -> list[ProductTime]:
    return [
        ProductTime(format=form, m=m, n=n, k=k, seconds=n * k * m**0.5 / rate)
        for m in (1, 4, 16, 256, 1024)
        for n, k in ((1024, 512), (8192, 1024), (512, 512), (2048, 2048))
    ]


def test_products_lie_between_their_neighbours() -> None:
    found = times("dense", 1e10)
    for m, n, k in ((1, 1024, 512), (2, 3000, 1000), (100, 1000, 1000), (3, 1000, 1000)):
        seconds = product_seconds(found, m, n, k)
        assert seconds == pytest.approx(n * k * m**0.5 / 1e10, rel=0.02)
    assert product_seconds(found, 2048, 2048, 2048) == pytest.approx(
        2 * product_seconds(found, 1024, 2048, 2048)
    )
    beyond = product_seconds(found, 1, 128256, 4096)
    assert beyond == pytest.approx(128256 * 4096 / 1e10)
    small = product_seconds(found, 1, 64, 64)
    assert small is not None and 0.4 < small / product_seconds(found, 1, 512, 512) < 0.6
    assert product_seconds([], 1, 64, 64) is None


def test_the_fit_is_non_negative_and_finds_what_is_there() -> None:
    drawn = np.random.default_rng(0)
    features = drawn.uniform(1, 100, (40, 5))
    true = np.array([2.0, 0.0, 0.5, 0.0, 1.0])
    assert nonnegative_fit(features, features @ true) == pytest.approx(true, abs=1e-6)
    noisy = features @ true * drawn.uniform(0.9, 1.1, 40)
    found = nonnegative_fit(features, noisy)
    assert (found >= 0).all()
    assert features @ found == pytest.approx(noisy, rel=0.25)
    # Where plain least squares would take a negative weight.
    pull = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = nonnegative_fit(pull, np.array([3.0, 2.0, 1.0]))
    assert (found >= 0).all() and math.isclose(found[1], 0.0)


def kernels(form: str = "dense") -> KernelTimes:
    """A device whose layers take 10 us and 1 us a token, its steps 1 ms."""
    layers = [
        LayerTime(
            batch=b, new=new, context=max(new, s), hidden=64, inner=128, heads=4, kv_heads=2,
            head_dim=16, seconds=1e-5 + 1e-6 * b * new,
        )
        for b in (1, 4, 16) for new in (1, 32) for s in (32, 256, 1024)
    ]  # fmt: skip
    fused = times("dense-fused", 1e10) if form == "dense" else []
    return KernelTimes(
        device="a chip", dtype="bfloat16", threads=2, measured_at="2026-01-01",
        products=(*times("dense", 1e10), *times(form, 1e10), *fused), layers=tuple(layers),
        steps=tuple(
            StepTime(batch=b, vocab_size=v, seconds=1e-3) for b in (1, 4, 16) for v in (1000, 50000)
        ),
    )  # fmt: skip


def test_by_kernels_the_parts_add_up() -> None:
    shape = shape_of({**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 1000})
    profile = static(shape, 1024)
    fused = {"qkv": "dense-fused", "gate_up": "dense-fused"}
    found = predict(shape, profile, H100, kernels=kernels(), formats=fused)
    products = 2 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 1000 * 4096
    expected = products / 1e10 + 2 * (1e-5 + 1e-6) + 1e-3
    assert found.tpot_s == pytest.approx(expected, rel=0.05)
    assert found.source == "kernels" and found.compute_share is None and found.missing == ()


def test_a_format_that_was_not_measured_is_named() -> None:
    shape = shape_of(LLAMA_8B)
    formats = dict.fromkeys(("qkv", "o", "gate_up", "down"), "nf4")
    found = predict(shape, static(shape, 64), H100, kernels=kernels(), formats=formats)
    assert found.missing == ("nf4",)


def test_kernel_times_are_kept_by_device_dtype_and_threads(tmp_path) -> None:
    record = kernels()
    file = store_kernel_times(record, cache=tmp_path)
    assert load_kernel_times("a chip", "bfloat16", 2, cache=tmp_path) == record
    assert load_kernel_times("a chip", "bfloat16", 1, cache=tmp_path) is None
    file.write_text("{")
    assert load_kernel_times("a chip", "bfloat16", 2, cache=tmp_path) is None
