"""Predicted times of a model's phases: by its operators, from a device's peaks or its kernels.

By peaks each operator takes the longer of its bytes and its FLOPs over an assumed share of them. By
kernels (infopt profile --calibrate) its products are looked up in what was measured, format by
format, and what a layer does beside them follows a fit of what layers took.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infopt.core.hardware.kernel_times import KernelTimes, LayerTime, product_seconds
from infopt.core.profiling.shape import LayerShape, ModelShape
from infopt.core.profiling.static import active_sizes
from infopt.core.reports.profile import PhaseCost, Prediction, StaticProfile

BANDWIDTH_SHARE = 0.8
COMPUTE_SHARE = 0.6
"""Of the peaks, assumed where no kernel was measured: 0.8 is what others assume of memory; large
products reach 60 to 80% of a datasheet."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A device's peaks."""

    flops_per_s: float
    bytes_per_s: float


def predict(
    shape: ModelShape,
    static: StaticProfile,
    speed: Speed,
    *,
    kernels: KernelTimes | None = None,
    formats: Mapping[str, str] | None = None,
) -> Prediction:
    """TTFT and TPOT of the profile's batch and lengths.

    `formats`: of each operator that is a product, how the runtime holds its weight; a format that
    `kernels` lack is taken by the roofline and named.
    """
    prefill = _roofline(static.prefill, speed)
    decode = _roofline(static.decode, speed)
    missing: tuple[str, ...] = ()
    if kernels is not None:
        found = _ByKernels(shape, kernels, formats or {}, speed)
        prefill = found.phase(
            static.prefill, static.batch, static.prompt_tokens, static.prompt_tokens
        )
        decode = found.phase(static.decode, static.batch, 1, static.context)
        missing = tuple(sorted(found.missing))
    kappa = static.kv_bytes_per_token
    return Prediction(
        ttft_s=prefill,
        tpot_s=decode,
        output_tokens_per_s=static.batch / decode,
        prefill_bound=_bound(static.prefill, speed),
        decode_bound=_bound(static.decode, speed),
        compute_share=None if kernels else COMPUTE_SHARE,
        bandwidth_share=None if kernels else BANDWIDTH_SHARE,
        critical_batch=critical_batch(shape, static, speed, kappa),
        critical_context=_critical_context(shape, speed, kappa),
        source="kernels" if kernels else "roofline",
        missing=missing,
    )


def critical_batch(
    shape: ModelShape, static: StaticProfile, speed: Speed, kv_per_token: int
) -> float | None:
    """Sequences from which decode at this context is bound by compute; None where none are.

    (W / BW) / (f / F - S k / BW): where reading a token's cache takes longer than its FLOPs, no
    batch helps. W counts what every step reads; of experts all are read at large batches.
    """
    read = sum(o.weight_bytes for o in static.decode.operators if o.name != "embedding")
    flops = static.decode.flops / static.batch
    gain = flops / speed.flops_per_s - static.context * kv_per_token / speed.bytes_per_s
    return read / speed.bytes_per_s / gain if gain > 0 else None


def _critical_context(shape: ModelShape, speed: Speed, kv_per_token: int) -> float:
    """2 N BW / (F k), the attention's own FLOPs aside."""
    matrices = sum(active_sizes(shape).values())
    return 2 * matrices * speed.bytes_per_s / (speed.flops_per_s * kv_per_token)


def _roofline(cost: PhaseCost, speed: Speed) -> float:
    return sum(
        max(
            (operator.weight_bytes + operator.activation_bytes)
            / (BANDWIDTH_SHARE * speed.bytes_per_s),
            operator.flops / (COMPUTE_SHARE * speed.flops_per_s),
        )
        for operator in cost.operators
    )


def _bound(cost: PhaseCost, speed: Speed) -> str:
    by_compute = cost.flops / speed.flops_per_s
    return "compute" if by_compute > cost.bytes / speed.bytes_per_s else "memory"


class _ByKernels:
    def __init__(
        self, shape: ModelShape, kernels: KernelTimes, formats: Mapping[str, str], speed: Speed
    ) -> None:
        self.shape, self.kernels, self.formats, self.speed = shape, kernels, formats, speed
        self.missing: set[str] = set()

    def phase(self, cost: PhaseCost, batch: int, new: int, context: int) -> float:
        """Seconds of one pass of `new` tokens of each sequence, the last at `context`."""
        tokens = batch * new
        hidden = self.shape.hidden_size
        found = 0.0
        for layer, count in Counter(self.shape.layers).items():
            products = (
                ("qkv", layer.qkv // hidden, hidden),
                ("o", hidden, layer.o // hidden),
                ("gate_up", layer.wide // hidden, hidden),
                ("down", hidden, layer.down // hidden),
            )
            each = (self._product(name, tokens, n, k) for name, n, k in products if n and k)
            found += count * sum(each)
        found += self._product("lm_head", batch, self.shape.vocab_size, self.shape.embedding_size)
        found += layers_seconds(self.kernels, self.shape, batch, new, context)
        return found + step_seconds(self.kernels, batch, self.shape.vocab_size)

    def _product(self, operator: str, m: int, n: int, k: int) -> float:
        form = self.formats.get(operator, "dense")
        times = [one for one in self.kernels.products if one.format == form]
        seconds = product_seconds(times, m, n, k)
        if seconds is not None:
            return seconds
        self.missing.add(form)
        reading = 2.0 * n * k / (BANDWIDTH_SHARE * self.speed.bytes_per_s)
        return max(reading, 2.0 * m * n * k / (COMPUTE_SHARE * self.speed.flops_per_s))


def layers_seconds(
    kernels: KernelTimes, shape: ModelShape, batch: int, new: int, context: int
) -> float:
    """What all layers take beside their products."""
    alike = [one for one in kernels.layers if (one.new == 1) == (new == 1)]
    features = np.array([_features_of(one) for one in alike])
    weights = nonnegative_fit(features, np.array([one.seconds for one in alike]))
    inner, hidden = shape.mlp_width, shape.hidden_size
    return sum(
        count * float(weights @ _features(layer, batch, new, context, hidden, inner))
        for layer, count in Counter(shape.layers).items()
    )


def _features_of(time: LayerTime) -> NDArray[np.float64]:
    wide = time.heads * time.head_dim
    layer = LayerShape(
        qkv=0, o=0, wide=0, down=0, pair_flops=4 * wide,
        kv_vectors=2 * time.kv_heads, kv_width=time.head_dim,
    )  # fmt: skip
    return _features(layer, time.batch, time.new, time.context, time.hidden, time.inner)


def _features(
    layer: LayerShape, batch: int, new: int, context: int, hidden: int, inner: int
) -> NDArray[np.float64]:
    """What a layer's own time is made of: calls, sequences, tokens, activations, cache, pairs."""
    seen = min(context, layer.window or context)
    pairs = layer.pairs(context) - layer.pairs(context - new)
    values = layer.kv_vectors * layer.kv_width
    return np.array(
        [
            1.0,
            float(batch),
            float(batch * new),
            float(batch * new * hidden),
            float(batch * new * inner),
            float(batch * new * (layer.pair_flops // 4 + values)),
            float(batch * seen * values),
            float(batch * pairs * layer.pair_flops),
        ]
    )


def step_seconds(kernels: KernelTimes, batch: int, vocab_size: int) -> float:
    """What a step takes beside its layers and products."""
    if not kernels.steps:
        return 0.0
    features = np.array([[1.0, one.batch, one.batch * one.vocab_size] for one in kernels.steps])
    weights = nonnegative_fit(features, np.array([one.seconds for one in kernels.steps]))
    return float(weights @ np.array([1.0, batch, batch * vocab_size]))


def nonnegative_fit(
    features: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights >= 0 of the least relative squared error (Lawson and Hanson 1974)."""
    rows = features / seconds[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)
    matrix, wanted = rows / scale, np.ones(len(seconds))
    active = np.zeros(matrix.shape[1], dtype=bool)
    found = np.zeros(matrix.shape[1])
    for _ in range(10 * matrix.shape[1]):
        slope = matrix.T @ (wanted - matrix @ found)
        slope[active] = -np.inf
        if active.all() or slope.max() <= 1e-10:
            break
        active[int(slope.argmax())] = True
        while True:
            trial = np.zeros_like(found)
            trial[active] = np.linalg.lstsq(matrix[:, active], wanted, rcond=None)[0]
            if (trial[active] > 0).all():
                found = trial
                break
            falling = active & (trial <= 0)
            step = np.min(found[falling] / np.maximum(found[falling] - trial[falling], 1e-300))
            found = found + step * (trial - found)
            active &= found > 1e-15
            found[~active] = 0.0
    weights: NDArray[np.float64] = found / scale
    return weights
