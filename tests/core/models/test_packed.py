"""Each format that `infopt quantize` writes, held packed: the same logits in less memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.tables import quantization_table
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.layout import encode
from infopt.core.formats.nf4 import Nf4Format, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, Layout, StoredWeight
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.quantized import QuantizedLinear
from infopt.core.layers.rounded import RoundedLinear
from infopt.core.models.config import ModelConfig
from infopt.core.models.decoder import StepInputs
from infopt.core.models.load import load_decoder
from infopt.core.models.shapes import linear_shapes
from infopt.core.models.stored import weight_bytes
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention
from infopt.kernels.gemm.int4 import Int4Tiles, usable

CPU = torch.device("cpu")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Round = Callable[[Tensor], StoredWeight]


def integers(bits: int, size: int | None, *, symmetric: bool, scattered: bool = False) -> Round:
    """Nearest, with scales of float16 as the formats store them."""
    form = IntegerFormat(bits, symmetric, size)

    def rounded(weight: Tensor) -> QuantizedWeight:
        outputs, inputs = weight.shape
        groups = form.groups(inputs)
        index = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
        if scattered:
            index = index[torch.randperm(inputs)]
        grouped = weight[:, torch.argsort(index, stable=True)].view(outputs, groups, -1)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / form.max_code).half()
        zeros = (-low / scales.float()).round().clamp(1, form.max_code)
        if symmetric:
            zeros.fill_(form.middle)
        steps = weight / scales.float()[:, index.long()] + zeros[:, index.long()]
        codes = steps.round().clamp(0, form.max_code).to(torch.uint8)
        return QuantizedWeight(codes, scales, zeros.to(torch.uint8), index, form)

    return rounded


def fp8(form: Fp8Format) -> Round:
    return lambda weight: to_fp8(weight, form)


def nf4(double: bool) -> Round:
    return lambda weight: quantize_nf4(weight, Nf4Format(double))


GROUPS = ActivationFormat("float", 8, "group", True, 128)
CASES: dict[str, tuple[Layout, Round, ActivationFormat | None]] = {
    "gptq w4": ("gptq", integers(4, 64, symmetric=True), None),
    "gptq w4 asym": ("gptq", integers(4, 32, symmetric=False), None),
    "gptq w4 act-order": ("gptq", integers(4, 64, symmetric=True, scattered=True), None),
    "gptq w4 channel": ("gptq", integers(4, None, symmetric=True), None),
    "gptq w3": ("gptq", integers(3, 64, symmetric=True), None),
    "gptq w2": ("gptq", integers(2, 32, symmetric=False), None),
    "gptq w8": ("gptq", integers(8, 64, symmetric=True), None),
    "awq": ("awq", integers(4, 64, symmetric=False), None),
    "pack-quantized": ("compressed-tensors", integers(4, 64, symmetric=True), None),
    "pack-quantized asym": ("compressed-tensors", integers(4, 64, symmetric=False), None),
    "pack-quantized w8": ("compressed-tensors", integers(8, None, symmetric=True), None),
    "naive-quantized": ("compressed-tensors", fp8(Fp8Format("channel")), None),
    "fp8 block": ("fp8", fp8(Fp8Format("block")), GROUPS),
    "nf4": ("bitsandbytes", nf4(False), None),
    "nf4 double": ("bitsandbytes", nf4(True), None),
}
MIXED: dict[str, Round] = {
    "q_proj": integers(8, 64, symmetric=True),
    "down_proj": integers(4, 32, symmetric=True),
    "gate_proj": integers(4, 64, symmetric=True),
    "up_proj": integers(4, 64, symmetric=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("packed") / "source"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return read_artifact(path)


def stored(
    source: Artifact,
    folder: Path,
    layout: Layout,
    rounds: dict[str, Round],
    activation: ActivationFormat | None = None,
) -> tuple[Artifact, Artifact]:
    """The artifact with its layers rounded, once in `layout` and once dense."""
    packed, dense = folder / "packed", folder / "dense"
    for copy in (packed, dense):
        shutil.copytree(source.path, copy)
    tensors = load_file(source.path / "model.safetensors")
    plain, schemes = dict(tensors), {}
    for name in list(tensors):
        layer, _, kind = name.rpartition(".")
        rounded = rounds.get(layer.rpartition(".")[2])
        if kind != "weight" or rounded is None:
            continue
        weight = rounded(tensors.pop(name).float())
        plain[name] = weight.dequantize()
        schemes[layer] = LayerScheme(weight.format, activation)
        parts = encode(layout, weight, activation=activation)
        tensors |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    left = [f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in LINEAR if p not in rounds]
    table = quantization_table(layout, schemes, [*left, "lm_head"])
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": table}))
    return read_artifact(packed), read_artifact(dense)


@torch.inference_mode()
def logits(artifact: Artifact, dtype: torch.dtype, tokens: int = 24) -> Tensor:
    decoder = load_decoder(artifact, dtype, CPU)
    config = decoder.config
    caches = [
        new_cache(2, 32, config.kv_heads, config.head_dim, dtype, CPU) for _ in range(config.layers)
    ]
    ids = torch.arange(tokens) * 7 % config.vocab_size
    places = torch.arange(tokens)
    plan = plan_attention([[0, 1]], [tokens], [0, tokens], 32, dtype, CPU)
    return decoder.logits(decoder(StepInputs(ids, places, places, plan), caches)).float()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def everywhere(rounded: Round) -> dict[str, Round]:
    return dict.fromkeys(LINEAR, rounded)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_model(
    case: str, source: Artifact, tmp_path: Path
) -> None:
    layout, rounded, activation = CASES[case]
    packed, dense = stored(source, tmp_path, layout, everywhere(rounded), activation)
    layer = load_decoder(packed, torch.float32, CPU).layers[1]
    down = layer.mlp.down
    if activation is not None:
        assert isinstance(down, RoundedLinear)
        return  # rounding inputs is tested against transformers in test_load
    assert isinstance(down, QuantizedLinear)
    kind = SideBySide if "nf4" in case or "act-order" in case else QuantizedLinear
    assert isinstance(layer.attention.qkv, kind)
    exact = logits(dense, torch.float32)
    torch.testing.assert_close(logits(packed, torch.float32), exact, atol=1e-5, rtol=1e-5)
    ours, theirs = (distance(logits(a, torch.bfloat16), exact) for a in (packed, dense))
    assert ours < 1.3 * theirs, "no worse in bfloat16 than dense weights"


def test_mixed_precision(source: Artifact, tmp_path: Path) -> None:
    packed, dense = stored(source, tmp_path, "gptq", MIXED)
    exact = logits(dense, torch.float32)
    torch.testing.assert_close(logits(packed, torch.float32), exact, atol=1e-5, rtol=1e-5)
    assert isinstance(load_decoder(packed, torch.float32, CPU).layers[0].attention.qkv, SideBySide)


@pytest.mark.skipif(not usable(), reason="torch's int4 product is another one on this CPU")
def test_one_row_and_many_take_the_same_weight(source: Artifact, tmp_path: Path) -> None:
    """A step of many rows dequantizes, one of few multiplies as it is: both are near the truth."""
    packed, dense = stored(source, tmp_path, "awq", everywhere(CASES["awq"][1]))
    down = load_decoder(packed, torch.bfloat16, CPU).layers[0].mlp.down
    assert isinstance(down, QuantizedLinear) and isinstance(down.weight, Int4Tiles)
    for tokens in (4, 60):
        exact = logits(dense, torch.float32, tokens)
        ours, theirs = (distance(logits(a, torch.bfloat16, tokens), exact) for a in (packed, dense))
        assert ours < 1.3 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["awq", "gptq w4 act-order", "gptq w3", "fp8 block", "nf4 double"])
@torch.inference_mode()
def test_deterministic_rows_never_see_the_others(
    case: str, dtype: torch.dtype, source: Artifact, tmp_path: Path
) -> None:
    layout, rounded, activation = CASES[case]
    packed, _ = stored(source, tmp_path, layout, everywhere(rounded), activation)
    mlp = load_decoder(packed, dtype, CPU, deterministic=True).layers[0].mlp
    x = torch.randn(50, 128).to(dtype)
    together = mlp(x)
    for part in (slice(0, 1), slice(7, 9), slice(4, 45)):
        assert torch.equal(mlp(x[part]), together[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, "dense"])
def test_memory_is_that_of_what_is_stored(
    case: str, dtype: torch.dtype, source: Artifact, tmp_path: Path
) -> None:
    """Up to orders of columns, tables of values and scales of the head, all small."""
    layout, rounded, activation = CASES.get(case, CASES["awq"])
    layers = {} if case == "dense" else everywhere(rounded)
    if not layers:
        artifact, packed_bytes = source, 0
    else:
        artifact, _ = stored(source, tmp_path, layout, layers, activation)
        packed_bytes = sum(
            h.nbytes
            for n, h in artifact.headers.items()
            if n.rsplit(".", 2)[-2] in LINEAR or any(f".{part}." in n for part in LINEAR)
        )
    decoder = load_decoder(artifact, dtype, CPU)
    dense = (2 * 96 * 128 + 5 * 128) * dtype.itemsize
    plain = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    expected = dense + (packed_bytes if layers else plain * dtype.itemsize)
    slack = 14 * (0 if case == "dense" else 2048 if "nf4" in case else 1200)
    assert abs(decoder.resident_bytes - expected) <= slack
    assert abs(weight_bytes(artifact, dtype) - decoder.resident_bytes) <= slack
    assert decoder.step_bytes == decoder.resident_bytes - 96 * 128 * dtype.itemsize


def test_eight_bit_inputs_stay_integers(source: Artifact, tmp_path: Path) -> None:
    form = ActivationFormat("int", 8, "token")
    packed, _ = stored(
        source, tmp_path, "compressed-tensors", everywhere(integers(8, None, symmetric=True)), form
    )
    assert isinstance(load_decoder(packed, torch.float32, CPU).layers[0].mlp.down, Int8Linear)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gemma2", "opt", "mixtral"])
@torch.inference_mode()
def test_every_architecture_holds_packed_layers(
    kind: str, tiny: Callable[[str], tuple[Artifact, Any]], tmp_path: Path
) -> None:
    """Conv1D's codes are [outputs, inputs], fused projections and experts are layers as others."""
    artifact, _ = tiny(kind)
    config = ModelConfig.from_hf(artifact.config)
    rounded, head = integers(4, 16, symmetric=False), config.names.head
    tensors = load_file(artifact.path / "model.safetensors")
    plain, packed, schemes = dict(tensors), dict(tensors), {}
    router = config.names.router
    for layer in linear_shapes(config):
        if layer == head or layer.endswith(router):
            continue
        dense = tensors[f"{layer}.weight"]
        weight = rounded(dense.t() if config.transposed else dense)
        value = weight.dequantize()
        plain[f"{layer}.weight"] = (value.t() if config.transposed else value).contiguous()
        schemes[layer] = LayerScheme(weight.format)
        del packed[f"{layer}.weight"]
        parts = encode("compressed-tensors", weight)
        packed |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    folders = (tmp_path / "packed", tmp_path / "plain")
    for folder, held in zip(folders, (packed, plain), strict=True):
        shutil.copytree(artifact.path, folder)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    table = quantization_table("compressed-tensors", schemes, [head])
    said = artifact.config | {"quantization_config": table}
    (folders[0] / "config.json").write_text(json.dumps(said))
    ours, theirs = (logits(read_artifact(folder), torch.float32) for folder in folders)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    layers = load_decoder(read_artifact(folders[0]), torch.float32, CPU).layers
    assert all(isinstance(layer.attention.qkv, QuantizedLinear) for layer in layers)
