"""What is done to rows between products, and choosing tokens, as models launch it."""

from collections.abc import Callable

import torch
from torch import Tensor

from infopt.kernels.gpu.example import Example, Launch
from infopt.kernels.gpu.gated import GELU, GELU_TANH, SILU, gate, gate_rounded
from infopt.kernels.gpu.rms_norm import rms_norm, rms_norm_rounded
from infopt.kernels.gpu.rounding import Rounding, round_rows
from infopt.kernels.gpu.sample import Choosing, sample
from infopt.kernels.gpu.tile import Card, Key, Tile

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
_INT8, _FLOAT8 = Rounding(torch.int8, 127.5), Rounding(F8, 448.0)
_ROWS = tuple(Tile({}, warps, 1) for warps in (2, 4, 8, 16, 32))


def _example(
    name: str,
    kernel: str,
    columns: int,
    launch: Callable[[Card, Tensor, Tensor], object],
    candidates: tuple[Tile, ...] = (),
    *,
    rows: int = 2048,
    wide: int = 1,
    dtype: torch.dtype = BF16,
    since: int = 80,
) -> Example:
    """`wide`: how many times as wide as the result a row is; with a row goes a norm's weight."""

    def build(device: torch.device) -> Launch:
        x = torch.ones(rows, wide * columns, dtype=dtype, device=device)
        gain = torch.ones(x.shape[1], dtype=dtype, device=device)
        return lambda card: launch(card, x, gain)

    key: Key = {"columns": columns}
    return Example(name, kernel, key, build, candidates, since=since)


def _sample(name: str, columns: int, dtype: torch.dtype) -> Example:
    def build(device: torch.device) -> Launch:
        rows = 32
        logits = torch.ones(rows, columns, dtype=dtype, device=device)
        how = Choosing(
            temperature=torch.full((rows,), 0.8, device=device),
            top_k=torch.full((rows,), 50, dtype=torch.int32, device=device),
            top_p=torch.full((rows,), 0.9, device=device),
            log_min_p=torch.full((rows,), -10.0, device=device),
            uniform=torch.full((rows,), 0.5, device=device),
        )
        if device.type != "meta":  # else all are equal, and no search is needed
            logits.normal_()
        return lambda card: sample(card, logits, how)

    sizes = ((b, w) for b in (1024, 2048, 4096, 8192) for w in (4, 8, 16, 32))
    candidates = tuple(Tile({"BLOCK": block}, warps, 1) for block, warps in sizes)
    return Example(name, "sample", {"columns": columns}, build, candidates)


EXAMPLES = (
    _example("norm", "row", 4096, lambda c, x, g: rms_norm(c, x, g, 1e-5), _ROWS),
    _example("norm, narrow", "row", 576, lambda c, x, g: rms_norm(c, x, g, 1e-5), _ROWS),
    _example("norm, wide", "row", 16384, lambda c, x, g: rms_norm(c, x, g, 1e-5, x), _ROWS),
    _example("norm and sum", "row", 4096, lambda c, x, g: rms_norm(c, x, g, 1e-5, x)),
    _example(
        "norm to int8", "row", 4096, lambda c, x, g: rms_norm_rounded(c, x, g, 0.1, _INT8)
    ),
    _example(
        "norm and sum to float8", "row", 8192,
        lambda c, x, g: rms_norm_rounded(c, x, g, 0.1, _FLOAT8, x), since=89,
    ),
    _example("rows to int8", "row", 14336, lambda c, x, _: round_rows(c, x, _INT8), _ROWS),
    _example(
        "rows to int8, outliers", "row", 4096,
        lambda c, x, _: round_rows(c, x, Rounding(torch.int8, 127.0, 6.0)),
    ),
    _example("rows to float8", "row", 28672, lambda c, x, _: round_rows(c, x, _FLOAT8), since=89),
    _example(
        "gate", "gate", 14336, lambda c, x, _: gate(c, x, SILU),
        tuple(Tile({"BLOCK": b}, w, 1) for b in (512, 1024, 2048, 4096) for w in (4, 8)), wide=2,
    ),
    _example("gate, gelu", "gate", 14336, lambda c, x, _: gate(c, x, GELU), wide=2, dtype=F32),
    _example(
        "gate to int8", "row", 14336, lambda c, x, _: gate_rounded(c, x, SILU, _INT8), wide=2
    ),
    _example(
        "gate to float8", "row", 28672, lambda c, x, _: gate_rounded(c, x, GELU_TANH, _FLOAT8),
        wide=2, since=89,
    ),
    _sample("sample", 128_256, F32),
    _sample("sample, bfloat16", 49_152, BF16),
)  # fmt: skip
