"""Which device and dtype to compute with."""

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.probe import cpu_isa, gpu_driver_present, gpus

# Without one of these a CPU emulates bfloat16 products, slower than float32.
BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})

_DTYPES = ("float32", "bfloat16", "float16")


def choose_device(word: str) -> str:
    """'cpu' or 'cuda' for 'auto', 'cpu' or 'cuda'; raises UnsupportedError for an absent GPU.

    torch is asked only where a GPU's driver is there, or one is demanded.
    """
    match word:
        case "cpu":
            return "cpu"
        case "auto":
            return "cuda" if (gpu_driver_present() or gpus()) and _torch_has_cuda() else "cpu"
        case "cuda":
            if _torch_has_cuda():
                return "cuda"
            why = (
                "this torch was built without CUDA, or the driver does not fit it"
                if gpus()
                else "no NVIDIA GPU was found"
            )
            raise UnsupportedError(f"no CUDA device can be used: {why}", "use --device cpu or auto")
    raise UsageError(f"unknown device {word!r}", "known: auto, cpu, cuda")


def choose_dtype(word: str, device: str) -> str:
    """A dtype's name for it or for 'auto': bfloat16 where the device computes it, else float32."""
    if word in _DTYPES:
        return word
    if word != "auto":
        raise UsageError(f"unknown dtype {word!r}", f"known: auto, {', '.join(_DTYPES)}")
    if device == "cuda":
        return "bfloat16" if _cuda_has_bf16() else "float16"
    return "bfloat16" if BF16_INSTRUCTIONS & set(cpu_isa()) else "float32"


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _cuda_has_bf16() -> bool:
    import torch

    return torch.cuda.get_device_capability() >= (8, 0)
