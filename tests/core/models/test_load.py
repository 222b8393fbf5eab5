import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.gptq import to_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.layers.choice import Choice
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear
from infopt.core.layers.quantized import QuantizedLinear
from infopt.core.layers.rounded import RoundedLinear
from infopt.core.models.decoder import StepInputs
from infopt.core.models.hf import load_transformers
from infopt.core.models.load import load_decoder
from infopt.core.models.stored import weight_bytes
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention
from infopt.kernels.gemm.int4 import Int4Tiles
from infopt.kernels.gemm.rows import dequantized
from infopt.kernels.gpu.tile import H100, Card

CPU = torch.device("cpu")
Tiny = Callable[[str], tuple[Artifact, Any]]
Stored = dict[str, Tensor]


def changed(
    artifact: Artifact, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> Artifact:
    """A copy of the artifact with its tensors changed."""
    copy = folder / "changed"
    shutil.copytree(artifact.path, copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return read_artifact(copy)


def test_weights_arrive_in_the_dtype_asked_for(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[0], torch.bfloat16, CPU)
    down = decoder.layers[1].mlp.down
    assert isinstance(down, Linear)
    assert decoder.dtype == down.weight.dtype == torch.bfloat16


def test_a_missing_tensor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    artifact = changed(tiny("llama")[0], tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ArtifactError, match=name):
        load_decoder(artifact, torch.float32, CPU)


def test_a_tensor_of_another_shape_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    artifact = changed(
        tiny("llama")[0], tmp_path, lambda tensors: tensors.update({name: torch.zeros(3, 4)})
    )
    with pytest.raises(ArtifactError, match=rf"{name} is \[3, 4\]"):
        load_decoder(artifact, torch.float32, CPU)


def test_a_quantized_linear_stays_packed(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    out, into, groups = 64, 96, 3
    weight = QuantizedWeight(
        codes=torch.randint(16, (out, into), dtype=torch.uint8),
        scales=torch.rand(out, groups).half(),
        zeros=torch.full((out, groups), 8, dtype=torch.uint8),
        group_index=torch.arange(into, dtype=torch.int32) // 32,
        format=IntegerFormat(4, symmetric=True, group_size=32),
    )

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}.weight"]
        stored = to_gptq(weight)
        tensors.update({f"{name}.{suffix}": t.contiguous() for suffix, t in stored.items()})

    artifact = changed(tiny("llama")[0], tmp_path, quantize)
    artifact.config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    decoder = load_decoder(artifact, torch.float32, CPU)
    down = decoder.layers[0].mlp.down
    assert isinstance(down, QuantizedLinear)
    assert not isinstance(down.weight, Int4Tiles)
    assert torch.equal(dequantized(down.weight, CPU), weight.dequantize().float())
    assert down.nbytes == out * into // 2 + out * groups * 2


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def int8_rows(weight: Tensor) -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def int4_groups(weight: Tensor) -> Stored:
    grouped = weight.unflatten(1, (-1, 32))
    scale = grouped.abs().amax(2, keepdim=True) / 7
    codes = (grouped / scale).round().to(torch.int8).flatten(1)
    return {"weight": codes, "weight_scale": scale.squeeze(2)}


def fp8_rows(weight: Tensor) -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def static(store: Callable[[Tensor], Stored], scale: float) -> Callable[[Tensor], Stored]:
    return lambda weight: {**store(weight), "input_scale": torch.tensor([scale])}


def bitsandbytes(weight: Tensor) -> Stored:
    found = int8_rows(weight)
    scb = found["weight_scale"].squeeze(1) * 127
    return {"weight": found["weight"], "SCB": scb, "weight_format": torch.tensor(0).byte()}


def table(stored: str, weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "symmetric": True, "dynamic": False, **weights},
                "input_activations": {"num_bits": 8, "symmetric": True, "dynamic": True, **inputs},
            }
        },
    }


INT8 = {"type": "int", "strategy": "channel"}
FP8 = {"type": "float", "strategy": "channel"}
INT4 = {"type": "int", "strategy": "group", "group_size": 32, "num_bits": 4}
STATIC = {"strategy": "tensor", "dynamic": False}


@dataclass(frozen=True)
class Case:
    store: Callable[[Tensor], Stored]
    quantization: dict[str, Any]
    kinds: tuple[type, type]
    """How the runtime holds QKV and the down projection."""
    layers: tuple[str, ...] = LINEAR


INT8_TABLE = table("int-quantized", INT8, {"type": "int", "strategy": "token"})
CASES = {
    "int8 by token": Case(int8_rows, INT8_TABLE, (Int8Linear, Int8Linear)),
    "int8 static": Case(
        static(int8_rows, 0.03),
        table("int-quantized", INT8, {"type": "int", **STATIC}),
        (Int8Linear, Int8Linear),
    ),
    "int8 in part": Case(
        int8_rows, INT8_TABLE, (SideBySide, Int8Linear), ("q_proj", "k_proj", "down_proj")
    ),
    "llm.int8": Case(
        bitsandbytes,
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 2.0},
        (Int8Linear, Int8Linear),
    ),
    "int4 and int8": Case(
        int4_groups,
        table("int-quantized", INT4, {"type": "int", "strategy": "token"}),
        (RoundedLinear, RoundedLinear),
    ),
    "fp8 by token": Case(
        fp8_rows,
        table("float-quantized", FP8, {"type": "float", "strategy": "token"}),
        (RoundedLinear, RoundedLinear),
    ),
    "fp8 static": Case(
        static(fp8_rows, 0.01),
        table("float-quantized", FP8, {"type": "float", **STATIC}),
        (RoundedLinear, RoundedLinear),
    ),
}


def quantized(source: Artifact, folder: Path, case: Case) -> Artifact:
    """A copy of the artifact with its linear layers stored as the case says."""
    copy = folder / "quantized"
    shutil.copytree(source.path, copy)
    tensors = load_file(copy / "model.safetensors")
    for name in [n for n in tensors if n.endswith(tuple(f"{p}.weight" for p in case.layers))]:
        layer = name.removesuffix(".weight")
        stored = case.store(tensors.pop(name))
        tensors |= {f"{layer}.{suffix}": t.contiguous() for suffix, t in stored.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = case.quantization
    (copy / "config.json").write_text(json.dumps(config))
    return read_artifact(copy)


@torch.inference_mode()
def runtime_logits(
    artifact: Artifact, prompts: Sequence[Tensor], choice: Choice | None = None
) -> list[Tensor]:
    """All prompts in one step of the runtime's decoder."""
    decoder = load_decoder(artifact, torch.float32, CPU, native=choice)
    config, size = decoder.config, 16
    caches = [
        new_cache(9, size, config.kv_heads, config.head_dim, torch.float32, CPU)
        for _ in range(config.layers)
    ]
    lengths = [len(prompt) for prompt in prompts]
    tables = [list(range(3 * p, 3 * p + -(-n // size))) for p, n in enumerate(lengths)]
    starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    slots = torch.cat([torch.arange(n) + 3 * size * p for p, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    plan = plan_attention(tables, lengths, starts, size, torch.float32, CPU)
    hidden = decoder(StepInputs(torch.cat(list(prompts)), positions, slots, plan), caches)
    return list(decoder.logits(hidden).split(lengths))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def prompts() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(97, (n,)) for n in (1, 37, 12)]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_runtime_computes_what_evaluation_computes(
    name: str, tiny: Tiny, tmp_path: Path, prompts: list[Tensor]
) -> None:
    case = CASES[name]
    artifact = quantized(tiny("llama")[0], tmp_path, case)
    layers = load_decoder(artifact, torch.float32, CPU).layers
    assert isinstance(layers[0].attention.qkv, case.kinds[0])
    assert isinstance(layers[1].mlp.down, case.kinds[1])
    model = load_transformers(artifact, torch.float32, CPU)
    wanted = [model(prompt[None]).logits[0] for prompt in prompts]
    for module in model.modules():
        module._forward_pre_hooks.clear()
    rounding = distance(model(prompts[1][None]).logits[0], wanted[1])
    assert rounding > 0.01, "inputs are rounded, and it shows"
    for ours, theirs in zip(runtime_logits(artifact, prompts), wanted, strict=True):
        # A sum whose last bit differs may fall on the other side of a rounding step, rarely.
        assert distance(ours, theirs) < 0.05 * rounding
        assert (ours - theirs).abs().amax(1).median() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_an_answer_does_not_depend_on_what_runs_with_it(
    name: str, tiny: Tiny, tmp_path: Path, prompts: list[Tensor]
) -> None:
    artifact = quantized(tiny("llama")[0], tmp_path, CASES[name])
    for prompt, together in zip(prompts, runtime_logits(artifact, prompts), strict=True):
        (alone,) = runtime_logits(artifact, [prompt])
        assert distance(together, alone) < 1e-3
        assert torch.equal(together.argmax(1), alone.argmax(1))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", [*CASES, "dense"])
def test_a_gpus_kernels_compute_the_same(
    name: str, tiny: Tiny, tmp_path: Path, prompts: list[Tensor]
) -> None:
    """Under Triton's interpreter, over tensors of this CPU."""
    pytest.importorskip("triton")
    from infopt.core.layers.card_products import CardChoice

    artifact = tiny("llama")[0]
    if name != "dense":
        artifact = quantized(artifact, tmp_path, CASES[name])
    prompts, choice = prompts[::2], CardChoice(Card.with_shipped(**H100))
    layers = load_decoder(artifact, torch.float32, CPU, native=choice).layers
    assert type(layers[0].mlp_norm).__name__ == "CardNorm"
    wanted = runtime_logits(artifact, prompts)
    for ours, torchs in zip(runtime_logits(artifact, prompts, choice), wanted, strict=True):
        # A sum whose last bit differs may fall on the other side of a rounding step, rarely.
        assert distance(ours, torchs) < 5e-3
        assert (ours - torchs).abs().amax(1).median() < 2e-5 * torchs.abs().max()


def test_int8_takes_a_quarter_of_the_memory(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama")[0]
    int8 = quantized(source, tmp_path, CASES["int8 by token"])
    for artifact in (source, int8):
        found = load_decoder(artifact, torch.float32, CPU).resident_bytes
        assert weight_bytes(artifact, torch.float32) == found
    rows = 2 * (64 + 2 * 32 + 64 + 2 * 96 + 64)
    linear = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 96)
    saved = weight_bytes(source, torch.float32) - weight_bytes(int8, torch.float32)
    assert saved == 3 * linear - 4 * rows


def test_a_scale_over_the_batch_is_refused(
    tiny: Tiny, tmp_path: Path, prompts: list[Tensor]
) -> None:
    inputs = {"type": "int", "strategy": "tensor"}
    case = Case(int8_rows, table("int-quantized", INT8, inputs), (Int8Linear, Int8Linear))
    artifact = quantized(tiny("llama")[0], tmp_path, case)
    with pytest.raises(UnsupportedError, match=r"q_proj are rounded with one scale for a whole"):
        load_decoder(artifact, torch.float32, CPU)
    model = load_transformers(artifact, torch.float32, CPU)
    assert bool(torch.isfinite(model(prompts[1][None]).logits).all())


def test_codes_of_another_shape_are_named(tiny: Tiny, tmp_path: Path) -> None:
    artifact = quantized(tiny("llama")[0], tmp_path, CASES["int8 by token"])
    artifact.config["intermediate_size"] = 80
    with pytest.raises(ArtifactError, match=r"gate_proj\.weight is \[96, 64\]"):
        load_decoder(artifact, torch.float32, CPU)
