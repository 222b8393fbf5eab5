"""Energy as the device counts it: NVML on a GPU, RAPL on a CPU; elsewhere refused."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infopt.core.errors import UnsupportedError

_POWERCAP = Path("/sys/class/powercap")
_IDLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class EnergyCounter:
    """A count of joules that only grows, but where it wraps."""

    source: str
    read: Callable[[], float]
    """Joules since some beginning."""
    wraps_at: float | None = None
    idle_seconds: float = _IDLE_SECONDS

    def joules_of(self, work: Callable[[], None], *, times: int) -> float:
        """Of one call of `work`, over `times` of them, idle power taken off; never below zero."""
        before = self.read()
        time.sleep(self.idle_seconds)
        idle = self._since(before) / self.idle_seconds
        before, began = self.read(), time.perf_counter()
        for _ in range(times):
            work()
        took = time.perf_counter() - began
        return max(0.0, self._since(before) - idle * took) / times

    def _since(self, before: float) -> float:
        found = self.read() - before
        return found + self.wraps_at if found < 0 and self.wraps_at is not None else found


def energy_counter(device: str, *, powercap: Path = _POWERCAP) -> EnergyCounter:
    """The counter of 'cpu' or 'cuda'; raises UnsupportedError where there is none to be read."""
    return _nvml() if device == "cuda" else _rapl(powercap)


def _rapl(root: Path) -> EnergyCounter:
    packages = [folder for folder in sorted(root.glob("*-rapl:*")) if folder.name.count(":") == 1]
    try:
        files = [folder / "energy_uj" for folder in packages]
        ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in packages]
        for file in files:
            int(file.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"the processor's energy counter cannot be read: {error}",
            "it is read under /sys/class/powercap, mostly by root alone; leave out --energy",
        ) from None
    if not files:
        raise UnsupportedError(
            "this processor shows no energy counter (RAPL)", "leave out --energy"
        )
    # Several packages wrap apart: with more than one, a wrap cannot be told from their sum.
    wraps = ranges[0] / 1e6 if len(ranges) == 1 else None
    return EnergyCounter("RAPL", lambda: sum(int(f.read_text()) for f in files) / 1e6, wraps)


def _nvml() -> EnergyCounter:
    """By NVML's own library where Python has its bindings, of the first GPU."""
    try:
        import pynvml
    except ImportError:
        raise UnsupportedError(
            "the GPU's energy counter is read by NVML, whose bindings are not installed",
            "pip install nvidia-ml-py",
        ) from None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise UnsupportedError(
            f"this GPU counts no energy: {error}", "leave out --energy"
        ) from None
    return EnergyCounter("NVML", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
