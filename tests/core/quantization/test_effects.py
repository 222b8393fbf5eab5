"""What each method is for, shown on tiny models where its enemy was planted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.calibration import calibration_tokens
from infopt.core.models.hf import load_transformers
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {
        "text": str(calibration_file),
        "samples": 16,
        "sequence_length": 32,
    }
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu"}
    return QuantizeSettings.model_validate(values | changes)


def rewritten(source: Artifact, change: Callable[[dict[str, Tensor]], None]) -> Artifact:
    """The model with other weights, in float32."""
    file = source.path / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    change(tensors)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, file, metadata={"format": "pt"})
    return read_artifact(source.path)


def spread(tensors: dict[str, Tensor], std: float = 0.12) -> None:
    """Matrices so large that every block matters; transformers' own are nearly none."""
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        if tensors[name].ndim == 2:
            tensors[name] = std * torch.randn(tensors[name].shape, generator=generator)


@pytest.fixture
def make(make_llama: MakeLlama) -> MakeLlama:
    """A random Llama in float32 whose blocks matter."""
    return lambda name="tiny", **changes: rewritten(make_llama(name, **changes), spread)


@torch.no_grad()
def logits(artifact: Artifact) -> Tensor:
    model = load_transformers(artifact, torch.float32, CPU)
    found: Tensor = model(input_ids=torch.arange(3, 99)[None], use_cache=False).logits
    return found


def off(artifact: Artifact, expected: Tensor) -> float:
    """How far the artifact's logits are from those expected, as a share."""
    return float((logits(artifact) - expected).norm() / expected.norm())


@pytest.mark.parametrize("changes", [{"gptaq": 0.25}, {"gptaq": 1.0, "act_order": False}], ids=str)
def test_gptaq_makes_up_for_inputs_that_are_off(
    make: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    source = make(num_hidden_layers=3)
    plain = {key: value for key, value in changes.items() if key != "gptaq"}
    wanted = {"plain": plain, "gptaq": changes}
    for name, options in wanted.items():
        quantize(source, tmp_path / name, settings(calibration_file, group_size=32, **options))
    artifacts = {name: read_artifact(tmp_path / name) for name in wanted}
    first = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    later = ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    for name in first + later:
        one, other = (codes(artifact, name) for artifact in artifacts.values())
        assert torch.equal(one, other) == (name in first), name
    tokens = calibration_tokens(source, settings(calibration_file).calibration, 0)
    errors = {name: drifted_error(source, artifacts[name], tokens) for name in wanted}
    assert errors["gptaq"] < 0.8 * errors["plain"], "measured 0.65 and less"


def codes(artifact: Artifact, name: str) -> Tensor:
    weight = linear_weight(artifact, name)
    assert not isinstance(weight, Tensor)
    return weight.codes


@torch.no_grad()
def drifted_error(source: Artifact, written: Artifact, tokens: Tensor) -> float:
    """||W x' - Q x||^2 / ||W x'||^2 over all layers, where x' are the original model's inputs."""
    outputs: list[dict[str, Tensor]] = [{}, {}]
    for artifact, seen in zip((source, written), outputs, strict=True):
        model = load_transformers(artifact, torch.float32, CPU)
        for name, layer in model.named_modules():
            if name.endswith("_proj"):
                layer.register_forward_hook(
                    lambda _, __, out, name=name, seen=seen: seen.__setitem__(name, out)
                )
        model(input_ids=tokens, use_cache=False)
    shares = [
        float((outputs[1][name] - out).square().sum() / out.square().sum())
        for name, out in outputs[0].items()
    ]
    return sum(shares) / len(shares)


def test_smoothing_alone_keeps_the_function(
    make: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make()
    wanted = settings(calibration_file, method="smoothquant", scheme="W16A16", alpha=0.5)
    report = quantize(source, tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    assert off(written, logits(source)) < 1e-5
    assert report.layers == () and report.format is None and report.bits is None
    assert written.config == source.config
    moved = {n for n in source.names() if not torch.equal(source.tensor(n), written.tensor(n))}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved} >= {
        "input_layernorm",
        "post_attention_layernorm",
        "q_proj",
        "gate_proj",
    }
    assert "model.embed_tokens.weight" not in moved and "model.norm.weight" not in moved


def in_norms(tensors: dict[str, Tensor]) -> None:
    """One channel of what the norms give is 64 times as large; the layers take it back."""
    for layer in range(2):
        block = f"model.layers.{layer}"
        behind = {
            "input_layernorm": [f"self_attn.{leaf}_proj" for leaf in "qkv"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }
        for norm, layers in behind.items():
            tensors[f"{block}.{norm}.weight"][5] *= 64
            for name in layers:
                tensors[f"{block}.{name}.weight"][:, 5] /= 64


def test_planted_outliers_of_activations_are_smoothed_away_or_left_as_they_are(
    make: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    plain = make()
    expected = logits(plain)
    source = rewritten(plain, in_norms)
    assert torch.equal(logits(source), expected), "a power of two, planted, changes no bit"
    cases: dict[str, dict[str, Any]] = {
        "plain": {"method": "rtn", "scheme": "W8A8-int8"},
        "smoothquant": {"method": "smoothquant"},
        "half": {"method": "smoothquant", "alpha": 0.5},
        "llm-int8": {"method": "llm-int8"},
        "no outliers": {"method": "llm-int8", "threshold": 1000.0},
    }
    found = {}
    for name, case in cases.items():
        quantize(source, tmp_path / name, settings(calibration_file, **case))
        found[name] = off(read_artifact(tmp_path / name), expected)
    # Measured 0.36, 0.035, 0.035, 0.13, 0.35.
    assert found["plain"] > 0.2
    assert found["smoothquant"] < 0.2 * found["plain"]
    assert found["half"] < 0.2 * found["plain"]
    assert found["llm-int8"] < 0.5 * found["plain"]
    assert found["no outliers"] > 0.7 * found["plain"], "it is the threshold that helps"


def offset(tensors: dict[str, Tensor]) -> None:
    """All tokens share a part that is spread evenly over the channels."""
    tensors["model.embed_tokens.weight"] += 3.0


def gathered(tensors: dict[str, Tensor]) -> None:
    """A reflection that brings the shared part into channel 5: norms without gain let it pass."""
    size = tensors["model.norm.weight"].numel()
    normal = torch.ones(size, dtype=torch.float64)
    normal[5] -= size**0.5
    mirror = torch.eye(size, dtype=torch.float64)
    mirror -= 2 * torch.outer(normal, normal) / normal.dot(normal)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            value = tensor.double()
            tensors[name] = (mirror @ value if writes else value @ mirror).float()


def test_rotation_takes_outliers_out_of_the_residual_stream(
    make: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    even = rewritten(make(), offset)
    expected = logits(even)
    source = rewritten(even, gathered)
    assert off(source, expected) < 1e-5, "the function is the same"
    cases: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn"},
        "gptq": {"method": "gptq"},
        "rotated rtn": {"method": "rotate", "rounding": "rtn"},
        "rotated gptq": {"method": "rotate"},
    }
    found = {}
    for name, case in cases.items():
        wanted = settings(calibration_file, scheme="W4A4-int4", group_size=32, **case)
        quantize(source, tmp_path / name, wanted)
        found[name] = off(read_artifact(tmp_path / name), expected)
    # Measured 0.019, 0.019, 0.0047, 0.0026.
    assert found["rotated rtn"] < 0.5 * found["rtn"]
    assert found["rotated gptq"] < 0.5 * found["gptq"]


def test_awq_loses_less_where_few_channels_carry_the_signal(
    make: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    def salient(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        gain = torch.exp(1.2 * torch.randn(64, generator=generator))
        for name in tensors:
            if name.endswith("layernorm.weight"):
                tensors[name] *= gain

    source = rewritten(make(), salient)
    cases: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn"},
        "scales": {"method": "awq", "symmetric": True, "clip": False},
        "clip": {"method": "awq", "symmetric": True},
    }
    errors = {}
    for name, case in cases.items():
        wanted = settings(calibration_file, bits=3, group_size=32, **case)
        report = quantize(source, tmp_path / name, wanted)
        errors[name] = sum(row.error for row in report.layers)
        if name != "rtn":
            assert errors[name] < 0.9 * sum(row.rtn_error for row in report.layers)
    assert errors["clip"] < errors["scales"]


def test_autoround_learns(make: MakeLlama, calibration_file: Path, tmp_path: Path) -> None:
    source = make()
    found = {}
    for steps in (1, 60):
        case = settings(calibration_file, method="autoround", bits=3, iterations=steps)
        quantize(source, tmp_path / str(steps), case)
        artifact = read_artifact(tmp_path / str(steps))
        tokens = calibration_tokens(source, case.calibration, 0)
        found[steps] = hidden_error(source, artifact, tokens)
    assert found[60] < 0.8 * found[1]


@torch.no_grad()
def hidden_error(source: Artifact, written: Artifact, tokens: Tensor) -> float:
    """How far the first block's outputs are off, as a share of their power."""
    first, other = (
        load_transformers(a, torch.float32, CPU)(
            input_ids=tokens, use_cache=False, output_hidden_states=True
        ).hidden_states[1]
        for a in (source, written)
    )
    return float((other - first).square().sum() / first.square().sum())
