import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from infopt.core.artifact.headers import DTYPES, read_header
from infopt.core.errors import ArtifactError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4, dtype=torch.int32),
        "d": torch.zeros(3, dtype=torch.uint8),
        "e": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "f": torch.tensor(1.5),
        "g": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert found[name].nbytes == tensor.nbytes and found[name].numel == tensor.numel()


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{not json", b"", "not JSON"),
        ([], b"", "not a table"),
        ({"a": {}}, b"", "no dtype"),
        ({"a": entry("F99")}, bytes(8), "F99"),
        ({"a": entry(["F32"])}, bytes(8), "not known"),
        ({"a": entry(shape=[-2])}, bytes(8), "natural"),
        ({"a": entry(shape=[2.0])}, bytes(8), "natural"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "natural"),
        ({"a": entry(offsets=[0, 4])}, bytes(4), "lies in 4 bytes"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "lies in -8 bytes"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlap"),
        ({"a": entry(offsets=[8, 16])}, bytes(16), "gap"),
        ({"a": entry()}, bytes(5), "3 bytes of tensor data are missing"),
        ({"a": entry()}, bytes(9), "1 bytes follow"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    file = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ArtifactError, match=words) as fault:
        read_header(file)
    assert str(file) in fault.value.message and "\n" not in fault.value.message


def test_every_truncation_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4), "b": torch.zeros(2)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read_header(tmp_path / "cut")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_noise_never_escapes_as_another_error(tmp_path: Path, data: bytes) -> None:
    for content in (data, struct.pack("<Q", len(data)) + data):
        (tmp_path / "noise").write_bytes(content)
        with contextlib.suppress(ArtifactError):
            read_header(tmp_path / "noise")


def test_dtypes_are_torchs() -> None:
    for word, bits in DTYPES.values():
        dtype = getattr(torch, word)
        assert dtype.itemsize * 8 == bits or word == "float4_e2m1fn_x2"
