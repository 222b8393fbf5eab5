"""Peaks of named devices, from their datasheets: dense, at the vendor's boost clock.

A name matches whole, the vendor's words aside: an A10G is no A10. What is not known raises;
nothing is guessed. Where it matters, measure instead: real products reach 60-90% of these.
"""

import re
from dataclasses import dataclass, field

from infopt.core.errors import UnsupportedError

_GB = 10**9
_T = 1e12


@dataclass(frozen=True, slots=True)
class DevicePeaks:
    """Dense FLOP/s (int8: operations/s) per dtype, bytes/s and bytes of memory."""

    name: str
    bytes_per_s: float
    flops_per_s: dict[str, float]
    """By dtype: float32, float16, bfloat16, float8, int8; a dtype that is not stated is absent."""
    memory_bytes: int | None
    """The nominal size, 10^9 bytes a GB; None where it is sold in several sizes."""
    unverified: frozenset[str] = field(default_factory=frozenset)
    """Dtypes whose figure comes from memory or a third party's table."""
    provenance: str = "datasheet"


def _gpu(
    name: str,
    bandwidth: float,
    memory: int | None,
    unverified: tuple[str, ...] = (),
    **tera: float,
) -> DevicePeaks:
    """GB/s, GB, and TFLOP/s by dtype; a tensor core's float16 is as fast as its bfloat16."""
    words = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8"}
    flops = {words.get(key, key): value * _T for key, value in tera.items()}
    if "bfloat16" in flops:
        flops.setdefault("float16", flops["bfloat16"])
    return DevicePeaks(name, bandwidth * _GB, flops, memory and memory * _GB, frozenset(unverified))


# GeForce rows are with float32 accumulation; float16 accumulation doubles them.
DEVICES: tuple[DevicePeaks, ...] = (
    _gpu("A100-SXM4-40GB", 1555, 40, bf16=312, int8=624),
    _gpu("A100-PCIE-40GB", 1555, 40, bf16=312, int8=624),
    _gpu("A100-SXM4-80GB", 2039, 80, bf16=312, int8=624),
    _gpu("A100 80GB PCIe", 1935, 80, bf16=312, int8=624),
    _gpu("H100 80GB HBM3", 3350, 80, bf16=989, fp8=1979, int8=1979),
    _gpu("H100 PCIe", 2000, 80, bf16=756, fp8=1513, int8=1513),
    _gpu("H200", 4800, 141, bf16=989, fp8=1979, int8=1979),
    _gpu("B200", 7700, 180, bf16=2250, fp8=4500, int8=4500),
    _gpu("L4", 300, 24, bf16=121, fp8=242, int8=242),
    _gpu("L40S", 864, 48, bf16=362, fp8=733, int8=733),
    _gpu("A10G", 600, 24, bf16=70, int8=140),
    _gpu("A10", 600, 24, bf16=125, int8=250),
    _gpu("Tesla T4", 320, 16, ("float16", "int8"), fp16=65, int8=130),
    _gpu("GeForce RTX 3090", 936, 24, ("int8",), bf16=71, int8=284),
    _gpu("GeForce RTX 4090", 1008, 24, ("int8",), bf16=165, fp8=330, int8=661),
    _gpu("GeForce RTX 5090", 1792, 32, ("float8", "int8"), bf16=210, fp8=419, int8=838),
    _gpu("AMD Instinct MI300X", 5300, 192, bf16=1307, fp8=2615, int8=2615),
    _gpu("Apple M4", 120, None, fp32=4.6),
    _gpu("Apple M4 Pro", 273, None, fp32=9.2),
    _gpu("Apple M4 Max", 546, None, fp32=18.4),
    _gpu("Apple M1", 68, None),
    _gpu("Apple M1 Pro", 200, None),
    _gpu("Apple M1 Max", 400, None),
    _gpu("Apple M1 Ultra", 800, None),
)

# Other names that mean one of the above, and no other.
_ALIASES = {
    "A100 40GB SXM": "A100-SXM4-40GB",
    "A100 40GB PCIe": "A100-PCIE-40GB",
    "A100 80GB SXM": "A100-SXM4-80GB",
    "H100 SXM": "H100 80GB HBM3",
    "H100 SXM5": "H100 80GB HBM3",
    "H100-SXM5-80GB": "H100 80GB HBM3",
    "H100-80GB-HBM3": "H100 80GB HBM3",
    "T4": "Tesla T4",
    "RTX 3090": "GeForce RTX 3090",
    "RTX 4090": "GeForce RTX 4090",
    "RTX 5090": "GeForce RTX 5090",
    "MI300X": "AMD Instinct MI300X",
    "Instinct MI300X": "AMD Instinct MI300X",
}


def find_device(name: str) -> DevicePeaks:
    """The datasheet of a device by the name its driver gives, such as 'NVIDIA L40S'.

    Letters' case, spaces, dashes and a leading 'NVIDIA' do not matter; everything else must agree.
    Raises UnsupportedError naming the known devices.
    """
    table = {_key(device.name): device for device in DEVICES}
    table |= {_key(alias): table[_key(known)] for alias, known in _ALIASES.items()}
    found = table.get(_key(name))
    if found is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UnsupportedError(f"no datasheet is known for the device {name!r}", f"known: {known}")
    return found


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower()).removeprefix("nvidia").removesuffix("gpu")
