"""Describe this machine without torch: its processor, memory, and NVIDIA GPUs."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
# The instruction sets that decide which kernels are worth running; /proc/cpuinfo's words for them.
_ISA = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its driver names it."""

    index: int
    name: str
    memory_bytes: int
    compute_capability: str
    driver: str


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, as much of it as this process may use."""

    cpu: str
    physical_cores: int
    """Cores this process may run on, hyperthreads counted once, a cgroup's quota respected."""
    logical_cores: int
    isa: tuple[str, ...]
    memory_total_bytes: int
    """Of the machine, or of the cgroup where that is less."""
    memory_available_bytes: int
    gpus: tuple[Gpu, ...]


def probe() -> Machine:
    """Look at this machine now."""
    text = _read(_CPUINFO)
    processors = parse_cpuinfo(text)
    allowed = _allowed_cpus()
    folders = cgroup_folders(_read(Path("/proc/self/cgroup")), _CGROUP)
    quotas = [quota for folder in folders if (quota := cpu_quota(folder)) is not None]
    quota = min(quotas, default=None)
    memories = [memory(folder) for folder in folders]
    total, available = (min(one) for one in zip(*memories, strict=True))
    return Machine(
        cpu=cpu_name(processors),
        physical_cores=physical_cores(processors, allowed, quota),
        logical_cores=min(len(allowed), quota or len(allowed)),
        isa=isa_flags(processors),
        memory_total_bytes=total,
        memory_available_bytes=available,
        gpus=gpus(),
    )


def peak_memory() -> int:
    """The largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """The processors of /proc/cpuinfo, each as its table of words."""
    processors = []
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        table = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if table:
            processors.append(table)
    return processors


def cpu_name(processors: list[dict[str, str]]) -> str:
    """The processor's name; its architecture where Linux does not tell (ARM)."""
    for table in processors:
        for key in ("model name", "Model", "Hardware", "cpu model"):
            if table.get(key):
                return table[key]
    return platform.processor() or platform.machine()


def isa_flags(processors: list[dict[str, str]]) -> tuple[str, ...]:
    """The flags of `_ISA` that the first processor has."""
    table = processors[0] if processors else {}
    flags = set((table.get("flags") or table.get("Features") or "").split())
    return tuple(flag for flag in _ISA if flag in flags)


def physical_cores(
    processors: list[dict[str, str]], allowed: frozenset[int], quota: int | None
) -> int:
    """Distinct cores among the allowed logical ones, at least 1 and at most the quota."""
    places = set()
    for table in processors:
        number = table.get("processor", "")
        if number.isdigit() and int(number) in allowed:
            # Without a core id (some virtual machines, ARM) each logical processor is a core.
            core = table.get("core id")
            places.add((table.get("physical id", "0"), core) if core else ("", number))
    cores = len(places) or psutil.cpu_count(logical=False) or len(allowed)
    return max(1, min(cores, len(allowed), quota or cores))


def cpu_isa() -> tuple[str, ...]:
    """The instruction sets of this machine's processor."""
    return isa_flags(parse_cpuinfo(_read(_CPUINFO)))


def cgroup_folders(text: str, root: Path) -> list[Path]:
    """The cgroup of this process and those around it, from /proc/self/cgroup; the root is last."""
    for line in text.splitlines():
        if line.startswith("0::/"):
            parts = line.removeprefix("0::/").strip().split("/")
            folder = root.joinpath(*parts)
            if ".." not in parts and folder.is_dir():
                around = [folder, *folder.parents]
                return around[: around.index(root) + 1]
    return [root]


def gpu_driver_present() -> bool:
    """Whether the system has a GPU driver's device node (NVIDIA, WSL, ROCm)."""
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def cpu_quota(cgroup: Path) -> int | None:
    """Whole CPUs that the cgroup (v2, then v1) grants; None where it sets no limit."""
    words = _read(cgroup / "cpu.max").split()
    if len(words) != 2:
        words = [
            _read(cgroup / "cpu" / "cpu.cfs_quota_us").strip(),
            _read(cgroup / "cpu" / "cpu.cfs_period_us").strip(),
        ]
    quota, period = words
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return max(1, int(quota) // int(period))


def memory(cgroup: Path) -> tuple[int, int]:
    """Total and available bytes; a cgroup's limit counts where it is less than the machine's."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit_file, used_file, stat_file in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit = _read(cgroup / limit_file).strip()
        if limit.isdigit() and int(limit) < total:
            used = _read(cgroup / used_file).strip()
            in_use = int(used) if used.isdigit() else 0
            in_use -= _reclaimable(_read(cgroup / stat_file))
            total = int(limit)
            available = min(available, max(0, total - in_use))
            break
    return total, available


def _reclaimable(stat: str) -> int:
    """Bytes of page cache that the kernel takes back when memory is wanted."""
    table = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    value = table.get("inactive_file") or table.get("total_inactive_file") or "0"
    return int(value) if value.strip().isdigit() else 0


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that nvidia-smi lists; none where it is absent or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    fields = "index,name,memory.total,compute_cap,driver_version"
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Lines of `index, name, MiB, compute capability, driver`; others are passed over."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and parts[0].isdigit() and parts[2].isdigit():
            index, name, mebibytes, capability, driver = parts
            found.append(Gpu(int(index), name, int(mebibytes) << 20, capability, driver))
    return tuple(found)


def _allowed_cpus() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
