"""How the packages below us behave in our processes: quietly, and as good neighbours."""

import ctypes
import logging
import os

# torchao, where it is installed, warns of CUDA libraries and of torch's own enums when imported.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def hush() -> None:
    """Show only the errors of packages that warn of what no user can act on."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def share_cores() -> None:
    """Let OpenMP threads sleep while they wait, and take memory by large pages, unless the user
    said otherwise.

    Must be called before torch is loaded. A thread that spins for a neighbour's core makes both
    slow: beside busy processes, products of 256 rows took a quarter of the time this way
    (docs/results/threads.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Tensors of 2 MiB and more: a tenth of GPTQ's time went into faults of pages of 4 KiB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_memory() -> None:
    """Give memory that was freed back to the system, where the C library knows how (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
