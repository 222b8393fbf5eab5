import pytest

from infopt.core.errors import UnsupportedError
from infopt.core.hardware.devices import DEVICES, find_device


@pytest.mark.parametrize(
    ("name", "bandwidth", "bf16"),
    [
        ("NVIDIA L40S", 864e9, 362e12),  # upper case, vendor's name before it
        ("NVIDIA L4", 300e9, 121e12),
        ("NVIDIA A10G", 600e9, 70e12),
        ("NVIDIA A10", 600e9, 125e12),
        ("NVIDIA A100-SXM4-40GB", 1555e9, 312e12),
        ("NVIDIA A100-SXM4-80GB", 2039e9, 312e12),
        ("NVIDIA A100 80GB PCIe", 1935e9, 312e12),
        ("NVIDIA H100 80GB HBM3", 3350e9, 989e12),
        ("NVIDIA H100 PCIe", 2000e9, 756e12),
        ("NVIDIA H200", 4800e9, 989e12),
        ("NVIDIA GeForce RTX 4090", 1008e9, 165e12),
        ("AMD Instinct MI300X", 5300e9, 1307e12),
        ("nvidia l40s", 864e9, 362e12),
    ],
)
def test_drivers_names(name: str, bandwidth: float, bf16: float) -> None:
    found = find_device(name)
    assert found.bytes_per_s == bandwidth
    assert found.flops_per_s["bfloat16"] == bf16 and found.provenance == "datasheet"


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40", "NVIDIA A100", "NVIDIA H100", "NVIDIA H100 NVL", "NVIDIA H20", "A10M", "L4S",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H2000", "T400",
        "NVIDIA T40", "Apple M4 Ultra", "AMD EPYC", "", "NVIDIA",
    ],
)  # fmt: skip
def test_kin_are_never_guessed(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no datasheet") as fault:
        find_device(name)
    assert fault.value.hint and "L40S" in fault.value.hint


def test_every_device_is_found_by_its_own_name_only() -> None:
    assert len({find_device(device.name).name for device in DEVICES}) == len(DEVICES)


def test_figures_are_dense_and_whole() -> None:
    for device in DEVICES:
        assert device.bytes_per_s > 5e10 and (device.memory_bytes or 16e9) >= 16e9
        assert device.unverified <= set(device.flops_per_s)
        assert set(device.flops_per_s) <= {"float32", "float16", "bfloat16", "float8", "int8"}
    assert "bfloat16" not in find_device("Tesla T4").flops_per_s
    assert "float8" not in find_device("A100-SXM4-80GB").flops_per_s
    # A sparse figure would be twice this.
    assert find_device("NVIDIA H100 80GB HBM3").flops_per_s["float8"] == 1979e12
    assert find_device("T4").unverified == {"float16", "int8"}
