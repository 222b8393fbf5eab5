import pytest

import infopt.core.hardware.choose as door
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import Gpu

GPU = Gpu(0, "NVIDIA L4", 24 << 30, "8.9", "570")


@pytest.mark.parametrize(("gpus", "cuda", "device"), [((), True, "cpu"), ((GPU,), False, "cpu"),
                                                      ((GPU,), True, "cuda")])  # fmt: skip
def test_auto_device(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...], cuda: bool, device: str
) -> None:
    monkeypatch.setattr(door, "gpus", lambda: gpus)
    monkeypatch.setattr(door, "gpu_driver_present", lambda: False)
    monkeypatch.setattr(door, "_torch_has_cuda", lambda: cuda)
    assert choose_device("auto") == device
    assert choose_device("cpu") == "cpu"


def test_an_absent_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_torch_has_cuda", lambda: False)
    for gpus, words in (((), "no NVIDIA GPU"), ((GPU,), "without CUDA")):
        monkeypatch.setattr(door, "gpus", lambda found=gpus: found)
        with pytest.raises(UnsupportedError, match=words):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        (("avx2", "fma"), "float32"),
        (("avx512f", "avx512_vnni"), "float32"),
        (("avx512f", "avx512_bf16"), "bfloat16"),
        (("amx_bf16",), "bfloat16"),
        (("asimd", "bf16"), "bfloat16"),
    ],
)
def test_auto_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, isa: tuple[str, ...], dtype: str
) -> None:
    monkeypatch.setattr(door, "cpu_isa", lambda: isa)
    assert choose_dtype("auto", "cpu") == dtype


def test_auto_dtype_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capable, dtype in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(door, "_cuda_has_bf16", lambda answer=capable: answer)
        assert choose_dtype("auto", "cuda") == dtype


def test_words() -> None:
    assert choose_dtype("float16", "cpu") == "float16"
    with pytest.raises(UsageError, match="tpu"):
        choose_device("tpu")
    with pytest.raises(UsageError, match="int3"):
        choose_dtype("int3", "cpu")
