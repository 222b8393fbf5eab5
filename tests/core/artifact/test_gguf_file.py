import contextlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infopt.core.artifact.gguf_file import TYPES, read_gguf
from infopt.core.errors import ArtifactError, InfoptError, UnsupportedError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.word", "größe")
    writer.add_array("a.words", ["x", "yy"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("m", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("v", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_fields_and_tensors(small: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(small)
    found = read_gguf(tmp_path / "x")
    assert found.fields["general.architecture"] == "llama"
    values = {key: value for key, value in found.fields.items() if key.startswith("a.")}
    assert values == {
        "a.number": 7, "a.float": 0.5, "a.bool": True, "a.word": "größe",
        "a.words": ["x", "yy"], "a.numbers": [1, 2, 3],
    }  # fmt: skip
    matrix = found.tensors["m"]
    assert matrix.shape == (2, 3) and matrix.type_name == "F32" and matrix.nbytes == 24
    raw = np.frombuffer(small, np.float32, 6, matrix.offset)
    assert raw.tolist() == list(range(6))
    assert found.tensors["v"].type_name == "F16"


def test_types_agree_with_the_gguf_package() -> None:
    for number, (name, elements, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.constants.GGML_QUANT_SIZES[kind] == (elements, size)


def test_every_truncation_is_found(small: bytes, tmp_path: Path) -> None:
    whole = read_gguf_bytes(tmp_path, small)
    end = max(tensor.offset + tensor.nbytes for tensor in whole.tensors.values())
    for length in range(end):
        with pytest.raises(ArtifactError) as fault:
            read_gguf_bytes(tmp_path, small[:length])
        assert "\n" not in fault.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b"GGML" + b[4:], "does not begin"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version 1"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version"),
        (lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:], "tensors"),
        (lambda b: b[:16] + struct.pack("<Q", 2**60) + b[24:], "fields"),
        (lambda b: b[:24] + struct.pack("<Q", 2**63) + b[32:], "past the end"),
    ],
)
def test_damage_is_named(small: bytes, tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(InfoptError, match=words):
        read_gguf_bytes(tmp_path, change(small))


def test_unknown_tensor_type_is_named(small: bytes, tmp_path: Path) -> None:
    place = small.index(b"\x01\x00\x00\x00\x00\x00\x00\x00m") + 9
    place += 4 + 2 * 8  # the number of dimensions, and two of them
    with pytest.raises(UnsupportedError, match="Q5_K") as fault:
        read_gguf_bytes(tmp_path, small[:place] + struct.pack("<I", 13) + small[place + 4 :])
    assert fault.value.hint == "known: F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, BF16"


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_never_escapes_as_another_error(small: bytes, tmp_path: Path, data: Any) -> None:
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(small) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InfoptError):
        read_gguf_bytes(tmp_path, bytes(damaged))


def read_gguf_bytes(folder: Path, content: bytes) -> Any:
    (folder / "case.gguf").write_bytes(content)
    return read_gguf(folder / "case.gguf")
