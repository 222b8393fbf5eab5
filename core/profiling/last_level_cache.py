"""How large the cache is that a bandwidth measurement must outgrow (no torch)."""

from pathlib import Path

ASSUMED = 32 * 2**20
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_SYSTEM = Path("/sys/devices/system/cpu")


def last_level_cache(root: Path = _SYSTEM) -> int | None:
    """Bytes of the processor's last-level caches, all together; None where Linux does not tell."""
    found: dict[tuple[int, str], int] = {}
    for entry in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((entry / "level").read_text())
            size = parse_size((entry / "size").read_text())
            sharers = (entry / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        found[level, sharers] = size
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def parse_size(text: str) -> int:
    """'32768K' is 33554432; raises ValueError for what is no size."""
    text = text.strip()
    unit = _UNITS.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit
