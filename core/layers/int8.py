"""A projection whose weight and inputs are 8-bit integers, multiplied as such."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, input_steps

# 1024 products of int8 stay below 2^24: float32 sums them exactly.
_EXACT_COLUMNS = 1024
# What torch._int_mm asks for on CUDA: more than 16 rows, and sides that 8 divides.
_CUDA_ROWS, _CUDA_MULTIPLE = 17, 8


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """y = (steps(x) codes^T) * input scale * scales, plus the outliers' share, plus bias.

    As F.linear of `round_inputs(x)` and the dequantized weight, but for the rounding of float
    sums; a row's integer sums are exact, whatever rows stand beside it. With an outlier threshold
    (LLM.int8; Dettmers et al. 2022, arXiv 2208.07339) each value that reaches it meets the
    dequantized column of the weight instead: judged by itself, not by its column over the batch,
    so that a request's answer does not depend on what runs with it.
    """

    codes: Tensor
    """int8 [N, K]"""
    scales: Tensor
    """float32 [N]"""
    activation: ActivationFormat
    """Integers of at most 8 bits, by token or with a static scale."""
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    """The static scale, [] or [1]."""
    fixed: bool = False
    """A row's result never depends on the others, outliers included."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        steps, scale = input_steps(rows, self.activation, self.input_scale)
        if not self.activation.dynamic:
            # A dynamic scale shows what is not finite; a static one does not, nor would int8.
            scale = scale + 0 * rows.sum(dim=-1, keepdim=True, dtype=torch.float32)
        sums = int8_product(steps.to(torch.int8), self.codes)
        y = sums.to(torch.float32).mul_(self.scales).mul_(scale)
        threshold = self.activation.outlier_threshold
        if threshold is not None:
            outliers = rows.abs() >= threshold
            # Which columns are summed must not depend on the rows beside.
            step = 1 if self.fixed else max(len(rows), 1)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                self._add_outliers(y[part], rows[part], outliers[part])
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _add_outliers(self, y: Tensor, rows: Tensor, outlier: Tensor) -> None:
        columns = outlier.any(dim=0).nonzero().squeeze(1)
        if columns.numel() > 0:
            kept = rows.masked_fill(~outlier, 0)[:, columns].to(torch.float32)
            weight = self.codes[:, columns].to(torch.float32).mul_(self.scales.unsqueeze(1))
            y.addmm_(kept, weight.t())

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        bias = self.bias.nbytes if self.bias is not None else 0
        return self.codes.nbytes + self.scales.nbytes + bias


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed, both int8, summed exactly: int32 [M, N]."""
    match a.device.type:
        case "cpu" if torch.backends.cpu.get_cpu_capability() == "AVX512":
            # Without it torch multiplies one number at a time.
            return torch._int_mm(a, b.t())
        case "cuda" if a.shape[1] % _CUDA_MULTIPLE == 0 and b.shape[0] % _CUDA_MULTIPLE == 0:
            missing = max(_CUDA_ROWS - a.shape[0], 0)
            padded = torch.nn.functional.pad(a, (0, 0, 0, missing))
            return torch._int_mm(padded, b.t())[: a.shape[0]]
        case _:
            return float_product(a, b)


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """The same by float32, in pieces that it sums exactly, where no integer product is fast."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_COLUMNS):
        piece = slice(start, start + _EXACT_COLUMNS)
        left, right = a[:, piece].to(torch.float32), b[:, piece].to(torch.float32)
        total += (left @ right.t()).to(torch.int32)
    return total
