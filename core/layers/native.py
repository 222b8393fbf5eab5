"""Projections and tables whose weights lie as the native kernels of a CPU read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kernels.cpu.dense import DensePanels, dense_linear, dense_rows
from infopt.kernels.cpu.groups import GroupPanels, groups_linear
from infopt.kernels.cpu.groups8 import groups8_linear
from infopt.kernels.cpu.int8 import Grid, Int8Panels, int8_linear
from infopt.kernels.cpu.native import Native


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """y = x W^T + b in the dtype of W, float32 or bfloat16; a row never depends on the others."""

    native: Native
    weight: DensePanels
    bias: Tensor | None = None
    """float32 [N]"""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        rows = x.reshape(-1, x.shape[-1])
        threads = torch.get_num_threads()
        y = dense_linear(self.native, rows, self.weight, self.bias, threads=threads)
        return y.view(*x.shape[:-1], y.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True, slots=True)
class NativeGroups:
    """y = x W^T + b; W integers in groups, exact, x float32 or bfloat16, as it is or rounded; a row
    never depends on the others."""

    native: Native
    weight: GroupPanels
    bias: Tensor | None = None
    """float32 [N]"""
    columns: Tensor | None = None
    """int32 [K]: the order of x in which the groups' columns are neighbours, where it is not so."""
    rounds: bool = False
    """Inputs become 8-bit integers, group by group and row by row: an approximation, of 4 bits."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        rows = x.reshape(-1, x.shape[-1])
        if self.columns is not None:
            rows = rows.index_select(1, self.columns)
        threads = torch.get_num_threads()
        product = groups8_linear if self.rounds else groups_linear
        y = product(self.native, rows, self.weight, self.bias, threads=threads)
        return y.view(*x.shape[:-1], y.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        order = self.columns.nbytes if self.columns is not None else 0
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0) + order


@dataclass(frozen=True, slots=True)
class NativeInt8:
    """y = (steps(x) codes^T) * input scale * scales + bias, to the last bit as `Int8Linear`."""

    native: Native
    weight: Int8Panels
    grid: Grid
    bias: Tensor | None = None
    """float32 [N]"""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        threads = torch.get_num_threads()
        y = int8_linear(self.native, rows, self.weight, self.grid, self.bias, threads=threads)
        return y.view(*x.shape[:-1], y.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes resident, all of them read by each call."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True, slots=True)
class NativeEmbedding:
    """Rows of a packed weight [vocabulary, hidden]; ids [T] -> [T, hidden]."""

    native: Native
    weight: DensePanels
    scale: float = 1.0

    def __call__(self, token_ids: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        found = dense_rows(self.native, self.weight, token_ids, threads=threads)
        return found if self.scale == 1.0 else found.mul_(self.scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.panels.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.panels.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def held_by(self, head: object) -> bool:
        """Whether a head is this table."""
        return isinstance(head, NativeLinear) and head.weight is self.weight
