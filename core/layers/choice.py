"""Native or torch: what each projection of a decoder becomes once it is whole."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from infopt.core.errors import ResourceError
from infopt.core.hardware.kernel_choices import KernelChoices, load_choices, store_choices
from infopt.core.hardware.native import find_native, wanted_kernels
from infopt.core.hardware.probe import probe
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.native import NativeLinear
from infopt.core.layers.rounded import RoundedLinear
from infopt.kernels.cpu.dense import pack_dense, packable
from infopt.kernels.cpu.native import Native

# A token, and a batch or a piece of a prompt: what is won at one must not be lost at the other.
_ROWS = (1, 32)
_RUNS = 3


@dataclass(slots=True)
class NativeChoice:
    """Gives a projection the native form of its weight, where that is possible and not slower."""

    native: Native
    measured: KernelChoices | None
    """What was measured so far; None: native wherever it is possible."""
    compare: Callable[[Projection, Projection, int, torch.dtype], bool] = field(
        default_factory=lambda: native_is_faster
    )
    found: int = 0
    """How many shapes were measured anew."""

    def settle(self, projection: Projection) -> Projection:
        """The projection itself, or its native form."""
        match projection:
            case Linear() if packable(projection.weight):
                return self._dense(projection)
            case RoundedLinear():
                return replace(projection, linear=self.settle(projection.linear))
            case SideBySide():
                return replace(projection, parts=tuple(map(self.settle, projection.parts)))
        return projection

    def _dense(self, linear: Linear) -> Projection:
        bias = None if linear.bias is None else linear.bias.float()
        native = NativeLinear(self.native, pack_dense(linear.weight), bias)
        outputs, inputs = linear.weight.shape
        takes = self._takes(f"dense {outputs}x{inputs}", linear, native, linear.weight)
        return native if takes else linear

    def _takes(self, key: str, torchs: Projection, native: Projection, like: Tensor) -> bool:
        if self.measured is None:
            return True
        if key not in self.measured.chosen:
            faster = self.compare(torchs, native, like.shape[1], like.dtype)
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


def native_choice(
    word: str, device: torch.device, dtype: torch.dtype, *, deterministic: bool
) -> NativeChoice | None:
    """For 'auto', 'native' or 'torch'; None where torch computes everything.

    A deterministic engine never depends on what was measured. Raises as `find_native`.
    """
    if device.type != "cpu" or (native := find_native(word)) is None:
        return None
    if wanted_kernels(word) == "native" or deterministic:
        return NativeChoice(native, None)
    versions = f"torch {torch.__version__}, native {native.isa} {native.build}"
    name = str(dtype).removeprefix("torch.")
    known = load_choices(probe().cpu, name, torch.get_num_threads(), versions)
    return NativeChoice(native, known)


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
    return ratio <= 1.0
