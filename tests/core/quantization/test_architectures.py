"""The door, end to end, on a tiny model of each kind of architecture."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from infopt.core.artifact.quantized import is_quantized, linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.targets import find_routers
from infopt.core.errors import UnsupportedError
from infopt.core.evaluation.evaluate import evaluate
from infopt.core.formats.number import QuantizedWeight
from infopt.core.models.hf import load_transformers, skeleton, stored_layer
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.recipe.quantize import QuantizeSettings

CPU = torch.device("cpu")
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GATED = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, tuple[Callable[[], Any], int]] = {
    "opt": (lambda: OPTConfig(**_SIZES, ffn_dim=96, word_embed_proj_dim=32), 6),
    "gpt2": (
        lambda: GPT2Config(
            vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=0
        ),
        4,
    ),
    "gpt_neox": (lambda: GPTNeoXConfig(**_SIZES, intermediate_size=96), 4),
    "qwen3": (lambda: Qwen3Config(**_GATED, head_dim=16), 7),
    "phi3": (lambda: Phi3Config(**_GATED), 4),
    "gemma": (lambda: GemmaConfig(**_GATED, head_dim=16), 7),
    "gemma3": (
        lambda: Gemma3TextConfig(
            **_GATED,
            head_dim=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        7,
    ),
    "mixtral": (lambda: MixtralConfig(**_GATED, num_local_experts=4), 16),
    "qwen3_moe": (lambda: Qwen3MoeConfig(**_GATED, **_MOE, head_dim=16), 16),
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(**_GATED, **_MOE, shared_expert_intermediate_size=64),
        19,
    ),
    "gpt_oss": (
        lambda: GptOssConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
        16,
    ),
}
"""The config, and how many linear layers a block of it has to quantize."""
MIXTURES = {name for name in CONFIGS if "moe" in name or name in ("mixtral", "gpt_oss")}
MakeModel = Callable[..., Artifact]
Change = Callable[[PreTrainedModel], None]


@pytest.fixture
def make_model(tmp_path: Path, make_llama: Callable[..., Artifact]) -> MakeModel:
    """A random model of a family in float32, with a byte tokenizer; `change` has the last word."""

    def make(family: str, change: Change = lambda _: None) -> Artifact:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family][0](), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            change(model)
        path = tmp_path / family
        model.save_pretrained(path)
        for file in make_llama("tokenizer").path.glob("*token*"):
            shutil.copy(file, path)
        return read_artifact(path)

    return make


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 8, "sequence_length": 32}
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu"}
    return QuantizeSettings.model_validate(values | changes)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_layer_is_quantized_and_read_back(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path, family: str, method: str
) -> None:
    source = make_model(family)
    report = quantize(source, tmp_path / "out", settings(calibration_file, method=method))
    experts = any(".experts." in row.name for row in report.layers)
    assert report.logits_max_difference == 0.0
    told = [warning for warning in report.warnings if not warning.startswith("not read")]
    assert [w[:17] for w in told] == (["plain transformers"[:17]] if experts else [])
    assert report.bits == 4 and len(report.layers) == 2 * CONFIGS[family][1]
    assert all(0 < row.error < 0.1 and row.fallback is None for row in report.layers)
    if method == "gptq":
        better = [row.error <= row.rtn_error for row in report.layers]
        assert sum(better) >= 0.9 * len(better)

    written = read_artifact(tmp_path / "out")
    found = load_transformers(written, torch.float32, CPU)
    expected = load_transformers(source, torch.float32, CPU)
    names = {row.name: stored_layer(found, written, row.name) for row in report.layers}
    with torch.no_grad():
        for name, stored in names.items():
            assert is_quantized(written, stored), stored
            weight = linear_weight(written, stored)
            assert isinstance(weight, QuantizedWeight) and weight.format.bits == 4
            expected.get_submodule(name).weight.copy_(weight.dequantize())
        tokens = torch.arange(3, 40)[None]
        difference = (found(tokens).logits - expected(tokens).logits).abs().max()
    assert float(difference) < 1e-6
    untouched = set(source.names()) & set(written.names())
    assert all(torch.equal(source.tensor(n), written.tensor(n)) for n in untouched)
    routers = find_routers(skeleton(source))
    assert bool(routers) == (family in MIXTURES)
    for router in routers:
        stored = f"{stored_layer(found, written, router)}.weight"
        assert stored in untouched, router


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rtn", "format": "compressed-tensors"},
        {"method": "fp8", "fp8": "static"},
        {"method": "smoothquant"},
        {"method": "awq"},
        {"method": "nf4"},
        {"method": "llm-int8"},
        {"method": "gptq", "dtype": "bfloat16"},
        {"method": "gptq", "true_sequential": False, "calibrate_all_experts": False},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_experts_are_quantized_in_every_format(
    make_model: MakeModel,
    calibration_file: Path,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
) -> None:
    source = make_model(family)
    report = quantize(source, tmp_path / "out", settings(calibration_file, **changes))
    assert report.logits_max_difference == 0.0
    written = read_artifact(tmp_path / "out")
    model = load_transformers(written, torch.float32, CPU)
    original = load_transformers(source, torch.float32, CPU)
    for row in report.layers:
        assert is_quantized(written, stored_layer(model, written, row.name)), row.name
        one, other = (m.get_submodule(row.name).weight.flatten() for m in (model, original))
        # Whatever the format, and scaled or not, it is still this expert's own projection: that
        # of another, or gate for up, would be at a right angle.
        assert float(torch.cosine_similarity(one, other, dim=0)) > 0.8, row.name


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_what_was_written_is_evaluated(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path, family: str
) -> None:
    source = make_model(family)
    quantize(source, tmp_path / "out", settings(calibration_file, method="rtn", bits=8))
    wanted = EvaluateSettings(
        text=str(calibration_file),
        tokens=256,
        context=64,
        device="cpu",
        dtype="float32",
        baseline=str(source.path),
    )
    report = evaluate(read_artifact(tmp_path / "out"), wanted, source)
    assert report.kl_divergence is not None and report.top1_agreement is not None
    assert 0 < report.kl_divergence < 0.01 and report.top1_agreement > 0.9


@pytest.mark.parametrize("calibrate_all", [True, False])
def test_an_expert_of_zeros_stays_one(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path, calibrate_all: bool
) -> None:
    def clear(model: PreTrainedModel) -> None:
        experts = model.get_submodule("model.layers.0.mlp.experts")
        experts.gate_up_proj[2].zero_()
        experts.down_proj[2].zero_()

    source = make_model("mixtral", clear)
    report = quantize(
        source,
        tmp_path / "out",
        settings(calibration_file, calibrate_all_experts=calibrate_all),
    )
    assert report.logits_max_difference == 0.0
    written = read_artifact(tmp_path / "out")
    for leaf in ("w1", "w2", "w3"):
        weight = linear_weight(written, f"model.layers.0.block_sparse_moe.experts.2.{leaf}")
        assert isinstance(weight, QuantizedWeight)
        assert not weight.dequantize().any() and bool(torch.isfinite(weight.scales).all())
    zeros = [row for row in report.layers if ".0.mlp.experts.2." in row.name]
    assert len(zeros) == 3 and all(row.error == 0.0 for row in zeros)


def starve(model: PreTrainedModel) -> None:
    """No token of the block 0 goes to its expert 3."""
    model.get_submodule("model.layers.0.mlp.router").bias[3] = -1e4


def test_a_starved_expert_is_rounded_with_a_warning(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_model("gpt_oss", starve)
    routed = settings(calibration_file, calibrate_all_experts=False)
    report = quantize(source, tmp_path / "routed", routed)
    starved = [row for row in report.layers if ".0.mlp.experts.3." in row.name]
    assert len(starved) == 3 and all(row.tokens == 0 and row.fallback for row in starved)
    assert any("only 0 tokens" in warning for warning in report.warnings)
    fed = [r for r in report.layers if ".experts." in r.name and r not in starved]
    assert all(0 < row.tokens < 8 * 32 for row in fed), "its own tokens, no more"
    nearest = quantize(source, tmp_path / "rtn", settings(calibration_file, method="rtn"))
    assert not any("tokens" in warning for warning in nearest.warnings)
    one, other = (
        codes(tmp_path / name, "model.layers.0.mlp.experts.3.up_proj") for name in ("routed", "rtn")
    )
    assert torch.equal(one, other)


def test_all_tokens_feed_every_expert(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_model("gpt_oss", starve)
    report = quantize(source, tmp_path / "out", settings(calibration_file))
    assert not any("tokens reached" in warning for warning in report.warnings)
    assert all(row.tokens == 8 * 32 for row in report.layers)
    quantize(source, tmp_path / "rtn", settings(calibration_file, method="rtn"))
    one, other = (
        codes(tmp_path / name, "model.layers.0.mlp.experts.3.up_proj") for name in ("out", "rtn")
    )
    assert not torch.equal(one, other)


def codes(path: Path, name: str) -> Tensor:
    weight = linear_weight(read_artifact(path), name)
    assert isinstance(weight, QuantizedWeight)
    return weight.codes


def test_an_ignored_expert_of_a_fused_checkpoint_is_written_apart(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_model("gpt_oss")
    changes = {"method": "rtn", "ignore": ("lm_head", "*.experts.1.*")}
    report = quantize(source, tmp_path / "out", settings(calibration_file, **changes))
    assert report.logits_max_difference == 0.0 and len(report.layers) == 2 * 13
    written = read_artifact(tmp_path / "out")
    gate = written.tensor("model.layers.0.mlp.experts.1.gate_proj.weight")
    fused = source.tensor("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(gate, fused[1, :, ::2].T)


def test_formats_whose_loaders_look_for_linear_layers_refuse_a_conv1d(
    make_model: MakeModel, calibration_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="Conv1D"):
        quantize(
            make_model("gpt2"),
            tmp_path / "out",
            settings(calibration_file, method="rtn", format="compressed-tensors"),
        )
