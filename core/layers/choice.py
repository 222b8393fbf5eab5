"""Native or torch: what each projection of a decoder becomes once it is whole."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from infopt.core.errors import ResourceError
from infopt.core.hardware.kernel_choices import KernelChoices, load_choices, store_choices
from infopt.core.hardware.native import find_native, wanted_kernels
from infopt.core.hardware.probe import probe
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.kept import Native3
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.native import NativeGroups, NativeInt8, NativeLinear
from infopt.core.layers.norm import Norm
from infopt.core.layers.quantized import QuantizedLinear, in_tiles
from infopt.core.layers.rounded import RoundedLinear
from infopt.kernels.cpu import groups8
from infopt.kernels.cpu.arena import Arena
from infopt.kernels.cpu.dense import DensePanels, pack_dense, packable
from infopt.kernels.cpu.groups import GroupPanels, pack_groups, packable_groups
from infopt.kernels.cpu.int8 import INPUTS, Grid, Int8Panels, pack_int8
from infopt.kernels.cpu.native import Native
from infopt.kernels.gemm.integers import IntegerRows

# A token, and a batch or a piece of a prompt: what is won at one must not be lost at the other.
_ROWS = (1, 32)
_RUNS = 3
_WORTH = 2.0
"""By so much, over both numbers of rows, torch must be faster: a decoder all of whose parts are
native is replayed in one call, which no product that is called from Python shows."""
_Native = TypeVar("_Native", NativeLinear, NativeGroups, NativeInt8)
_DTYPES = (torch.float32, torch.bfloat16)


class Choice(Protocol):
    """Whose kernels do what of a decoder: a CPU's native ones or a GPU's."""

    def settle(self, projection: Projection) -> Projection:
        """The projection in its last form."""
        ...

    def norm(self, norm: Norm) -> Norm:
        """The norm in its last form."""
        ...

    def gate(self, activation: str) -> Callable[[Tensor], Tensor] | None:
        """activation(gate) * up of [T, 2 * inner] in one pass; None where torch does it."""
        ...

    def keep(self) -> None:
        """Store what was found out, for the next load."""
        ...


@dataclass(slots=True)
class NativeChoice:
    """Gives a projection the native form of its weight, where that is possible and not slower."""

    native: Native
    dtype: torch.dtype
    """Of inputs and results; without native products in float16."""
    measured: KernelChoices | None
    """What was measured so far; None: native wherever it is possible."""
    compare: Callable[[Projection, Projection, int, torch.dtype], bool] = field(
        default_factory=lambda: native_is_faster
    )
    rounds: bool = False
    """Round the inputs of weights of 4 bits in groups to 8 bits; torch has no such product."""
    arena: Arena = field(default_factory=Arena)
    """Where the weights of native projections lie."""
    found: int = 0
    """How many shapes were measured anew."""

    def settle(self, projection: Projection) -> Projection:
        """The projection itself, its native form, or torch's best one."""
        match projection:
            case Linear() if packable(projection.weight):
                return self._dense(projection)
            case QuantizedLinear():
                return self._groups(projection)
            case Int8Linear() if _roundable(projection):
                return self._int8(projection)
            case RoundedLinear():
                return replace(projection, linear=self.settle(projection.linear))
            case SideBySide():
                return replace(projection, parts=tuple(map(self.settle, projection.parts)))
        return projection

    def norm(self, norm: Norm) -> Norm:
        """As it is: steps that are recorded have native ones."""
        return norm

    def gate(self, activation: str) -> None:
        """The same."""

    def takes(self, native: Native3) -> Native3 | None:
        """A projection that was packed before, where it would be taken now; nothing is timed."""
        if isinstance(native, NativeGroups) and self.rounds and groups8.takes(native.weight):
            return replace(native, rounds=True)
        chosen = None if self.measured is None else self.measured.chosen.get(_key_of(native.weight))
        return native if self.measured is None or chosen == "native" else None

    def _dense(self, linear: Linear) -> Projection:
        if self._lost("dense", linear.weight.shape):
            return linear
        native = NativeLinear(self.native, pack_dense(linear.weight), _bias(linear.bias))
        takes = self._takes("dense", linear, native, linear.weight.shape)
        return self._placed(native) if takes else linear

    def _groups(self, linear: QuantizedLinear) -> Projection:
        weight = linear.weight
        torchs = linear if self.dtype != torch.bfloat16 else in_tiles(linear)
        if not isinstance(weight, IntegerRows) or not packable_groups(
            weight.bits, weight.inputs, weight.scales.shape[1]
        ):
            return torchs
        form = _groups_form(
            weight.bits, weight.inputs // weight.scales.shape[1], isinstance(weight.zeros, Tensor)
        )
        rounds = self.rounds and weight.bits == groups8.BITS
        if not rounds and self._lost(form, weight.shape):
            return torchs
        codes = weight.codes(slice(0, weight.shape[0]), linear.scratch)
        packed = pack_groups(codes, weight.scales, weight.zeros, weight.bits)
        native = NativeGroups(self.native, packed, _bias(linear.bias), linear.columns, rounds)
        takes = rounds or self._takes(form, torchs, native, weight.shape)
        return self._placed(native) if takes else torchs

    def _int8(self, linear: Int8Linear) -> Projection:
        if self._lost("W8A8", linear.codes.shape):
            return linear
        form, fixed = linear.activation, linear.input_scale
        fixed = None if form.dynamic or fixed is None else fixed.reshape(1).float()
        grid = Grid(form.largest, 1 << (form.bits - 1), fixed)
        packed = pack_int8(linear.codes, linear.scales)
        native = NativeInt8(self.native, packed, grid, _bias(linear.bias))
        takes = self._takes("W8A8", linear, native, linear.codes.shape)
        return self._placed(native) if takes else linear

    def another(self, projection: Projection) -> Projection:
        """The same weight in memory of its own, placed as that of a decoder's next layer would be:
        to measure one that is not in the cache."""
        match projection:
            case NativeLinear():
                return self._placed(projection)
            case NativeGroups():
                return self._placed(projection)
            case NativeInt8():
                return self._placed(projection)
        return deepcopy(projection)

    def _placed(self, native: _Native) -> _Native:
        """The same, its weight behind those that were chosen before it."""
        return replace(native, weight=self.arena.take(native.weight))

    def _lost(self, form: str, shape: Sequence[int]) -> bool:
        """Whether torch is known to be faster, so that nothing need be packed."""
        found = None if self.measured is None else self.measured.chosen.get(_key(form, shape))
        return found == "torch"

    def _takes(
        self, form: str, torchs: Projection, native: Projection, shape: Sequence[int]
    ) -> bool:
        if self.measured is None:
            return True
        key = _key(form, shape)
        if key not in self.measured.chosen:
            faster = self.compare(torchs, native, shape[1], self.dtype)
            chosen = {**self.measured.chosen, key: "native" if faster else "torch"}
            self.measured = self.measured.model_copy(update={"chosen": chosen})
            self.found += 1
        return self.measured.chosen[key] == "native"

    def keep(self) -> None:
        """Store what was measured, for the next load; on a full disk that measures again."""
        if self.measured is not None and self.found:
            try:
                store_choices(self.measured)
            except ResourceError:
                return


def _key(form: str, shape: Sequence[int]) -> str:
    return f"{form} {shape[0]}x{shape[1]}"


def _groups_form(bits: int, group: int, zeros: bool) -> str:
    return f"W{bits}A16 g{group}{' zeros' if zeros else ''}"


def _key_of(weight: DensePanels | GroupPanels | Int8Panels) -> str:
    match weight:
        case DensePanels():
            return _key("dense", weight.shape)
        case GroupPanels():
            form = _groups_form(weight.bits, weight.group, weight.zeros is not None)
            return _key(form, weight.shape)
        case Int8Panels():
            return _key("W8A8", weight.shape)


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _roundable(linear: Int8Linear) -> bool:
    """Outliers are torch's to sum."""
    return linear.activation.outlier_threshold is None and linear.codes.shape[1] <= INPUTS


def native_choice(
    word: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool,
    rounds: bool = False,
) -> NativeChoice | None:
    """For 'auto', 'native' or 'torch'; None where torch computes everything.

    A deterministic engine never depends on what was measured. `rounds`: inputs of weights of 4 bits
    are to be rounded to 8. Raises as `find_native`.
    """
    if device.type != "cpu" or dtype not in _DTYPES:
        return None
    if (native := find_native(word)) is None:
        return None
    if wanted_kernels(word) == "native" or deterministic:
        return NativeChoice(native, dtype, None, rounds=rounds)
    versions = f"torch {torch.__version__}, native {native.isa} {native.build}"
    name = str(dtype).removeprefix("torch.")
    known = load_choices(probe().cpu, name, torch.get_num_threads(), versions)
    return NativeChoice(native, dtype, known, rounds=rounds)


def native_is_faster(
    torchs: Projection, native: Projection, inputs: int, dtype: torch.dtype
) -> bool:
    """Over a single row and over many, by the product of both ratios of least times."""
    ratio = 1.0
    with torch.inference_mode():
        for rows in _ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            times: tuple[list[float], list[float]] = ([], [])
            for run in range(_RUNS + 1):
                for projection, kept in zip((torchs, native), times, strict=True):
                    began = perf_counter()
                    projection(x)
                    if run:
                        kept.append(perf_counter() - began)
            ratio *= min(times[1]) / min(times[0])
    return ratio <= _WORTH
