"""The machine and the software that made a report."""

import os
import platform
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from infopt.core.hardware.choose import choose_device
from infopt.core.hardware.probe import Machine, probe
from infopt.core.reports.schema import Environment, Making

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "accelerate", "triton")
_THREADS = "OMP_NUM_THREADS"


def environment(device: str = "auto") -> Environment:
    """Describe where this process computes; `device` is auto, cpu or cuda."""
    machine = probe()
    return Environment(
        infopt=version("infopt"),
        python=platform.python_version(),
        platform=platform.platform(),
        device=_device_name(machine, device),
        cpu=machine.cpu,
        threads=_threads(machine),
        memory_bytes=machine.memory_total_bytes,
        packages=installed(_PACKAGES),
    )


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def making(
    *,
    argv: tuple[str, ...],
    settings: dict[str, Any],
    created: datetime,
    seconds: float,
    device: str,
) -> Making:
    """How a report came about."""
    return Making(
        argv=argv,
        settings=settings,
        seed=settings.get("seed"),
        created=created.isoformat(timespec="seconds"),
        seconds=seconds,
        environment=environment(device),
    )


def _device_name(machine: Machine, device: str) -> str:
    on_gpu = machine.gpus and choose_device(device) == "cuda"
    return machine.gpus[0].name if on_gpu else machine.cpu


def _threads(machine: Machine) -> int:
    if (torch := sys.modules.get("torch")) is not None:  # what computed knows best
        return int(torch.get_num_threads())
    asked = os.environ.get(_THREADS, "")
    return int(asked) if asked.isdigit() else machine.physical_cores
