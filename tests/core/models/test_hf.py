import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gemma import GemmaConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.granitemoe import GraniteMoeConfig
from transformers.models.hrm_text import HrmTextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.nemotron_h import NemotronHConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.gptq import to_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.experts import Experts, calibrate_experts
from infopt.core.models.hf import (
    blocks,
    load_transformers,
    materialize,
    release,
    resolve,
    skeleton,
    stored_layer,
)
from infopt.core.models.unfused import unfused

CPU = torch.device("cpu")
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LLAMA = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_NEMOTRON = {
    "layer_types": ["moe", "full_attention"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama-tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    ),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=8),
    "phi3": lambda: Phi3Config(**_LLAMA),
    "gemma": lambda: GemmaConfig(**_LLAMA, head_dim=8),
    # Their checkpoints name tensors otherwise than the model: transformers renames them.
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=64),
    # transformers fuses the experts; their checkpoints hold them apart,
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_LLAMA, **_MOE, head_dim=8),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_LLAMA, **_MOE, shared_expert_intermediate_size=32),
    # without a gate,
    "nemotron_h_moe": lambda: NemotronHConfig(**_LLAMA, **_NEMOTRON),
    # or fused; these with biases, gate and up interleaved, and transposed.
    "granitemoe": lambda: GraniteMoeConfig(**_LLAMA, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(**_LLAMA, num_local_experts=4, head_dim=8),
}
MIXTURES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "qwen2_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "granitemoe": "model.layers.1.block_sparse_moe.input_linear.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
}
"""Where their checkpoints hold the gate of the expert 3 in the block 1."""
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 0.1}
"""Of a logit; logits are around 1, and bfloat16 has eight bits."""


def saved(tmp_path: Path, family: str = "llama") -> Artifact:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    # Biases begin at zero, and the usual weights are so small that blocks hardly do anything.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    return read_artifact(tmp_path)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_that_of_transformers(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    artifact = saved(tmp_path, family)
    found = load_transformers(artifact, dtype, CPU)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        difference = (found(tokens).logits - expected(tokens).logits).abs().max()
    # The gates and ups of an expert are one product there and two here, which the threads of a
    # product and the interleaving of its columns may add up in another order.
    assert float(difference) <= (ROUNDING[dtype] if "moe" in family or family in MIXTURES else 0.0)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    artifact = saved(tmp_path, "llama-tied")
    assert not artifact.has("lm_head.weight")
    model = load_transformers(artifact, torch.float32, CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_head_stored_under_its_other_name_is_found(tmp_path: Path) -> None:
    saved(tmp_path, "llama-tied")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_transformers(read_artifact(tmp_path), torch.float32, CPU)
    assert torch.equal(model.get_input_embeddings().weight, tensors["lm_head.weight"])


def test_a_skeleton_has_no_weights_but_its_buffers(tmp_path: Path) -> None:
    model = skeleton(saved(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers and not any(b.is_meta for b in buffers.values())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_a_block_comes_and_goes(tmp_path: Path) -> None:
    artifact = saved(tmp_path)
    model = skeleton(artifact)
    assert [name for name, _ in blocks(model)] == ["model.layers.0", "model.layers.1"]
    name, block = blocks(model)[1]
    materialize(model, name, block, artifact, torch.float32, CPU)
    assert not any(p.is_meta for p in block.parameters())
    assert sum(not p.is_meta for p in model.parameters()) == len(list(block.parameters()))
    release(block)
    assert all(p.is_meta for p in model.parameters())


def change_tensors(path: Path, drop: str | None = None, add: str | None = None) -> Artifact:
    tensors = load_file(path / "model.safetensors")
    if drop:
        tensors.pop(drop)
    if add:
        tensors[add] = torch.zeros(3)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return read_artifact(path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    artifact = change_tensors(tmp_path, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ArtifactError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_transformers(artifact, torch.float32, CPU)


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    artifact = change_tensors(tmp_path, add="model.layers.7.stray")
    with pytest.raises(ArtifactError, match=r"model\.layers\.7\.stray"):
        load_transformers(artifact, torch.float32, CPU)


def test_old_rotary_tables_are_let_be(tmp_path: Path) -> None:
    saved(tmp_path)
    artifact = change_tensors(tmp_path, add="model.layers.0.self_attn.rotary_emb.inv_freq")
    load_transformers(artifact, torch.float32, CPU)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight has the shape \[31\]"):
        load_transformers(read_artifact(tmp_path), torch.float32, CPU)


def test_an_unknown_architecture_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "novelty"}))
    with pytest.raises(UnsupportedError, match="novelty"):
        skeleton(read_artifact(tmp_path))


def test_sizes_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(UnsupportedError, match="not a multiple"):
        skeleton(read_artifact(tmp_path))


def quantized(path: Path) -> tuple[Artifact, QuantizedWeight]:
    """A saved model with one layer of 4-bit codes."""
    saved(path)
    return with_codes(path, "model.layers.0.mlp.gate_proj", 64, 32)


def with_codes(
    path: Path, name: str, outputs: int, inputs: int
) -> tuple[Artifact, QuantizedWeight]:
    """The saved model with 4-bit codes in the place of the layer stored as `name`."""
    tensors = load_file(path / "model.safetensors")
    number_format = IntegerFormat(4, True, 32)
    weight = QuantizedWeight(
        codes=torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8),
        scales=torch.rand(outputs, inputs // 32).half(),
        zeros=torch.full((outputs, inputs // 32), 8, dtype=torch.uint8),
        group_index=torch.arange(inputs, dtype=torch.int32) // 32,
        format=number_format,
    )
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.{key}": part for key, part in to_gptq(weight).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return read_artifact(path), weight


def test_quantized_layers_are_dequantized(tmp_path: Path) -> None:
    artifact, weight = quantized(tmp_path)
    model = load_transformers(artifact, torch.float32, CPU)
    found = model.get_submodule("model.layers.0.mlp.gate_proj").weight
    assert torch.equal(found, weight.dequantize())


def test_a_part_of_a_quantized_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    quantized(tmp_path)
    artifact = change_tensors(tmp_path, drop="model.layers.0.mlp.gate_proj.scales")
    with pytest.raises(ArtifactError, match=r"gate_proj\.scales"):
        load_transformers(artifact, torch.float32, CPU)


def test_a_conv1d_is_a_linear_layer(tmp_path: Path) -> None:
    artifact = saved(tmp_path, "gpt2")
    name = "transformer.h.0.mlp.c_fc"
    model = load_transformers(artifact, torch.float32, CPU)
    layer = model.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear) and (layer.in_features, layer.out_features) == (
        32,
        128,
    )
    assert is_transposed(model, name) and not is_transposed(model, "lm_head")
    (stored,) = resolve(model, artifact, f"{name}.weight")
    assert torch.equal(layer.weight.T, artifact.tensor(stored))


def test_codes_of_a_conv1d_are_not_transposed(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    artifact, weight = with_codes(tmp_path, "transformer.h.0.mlp.c_fc", 128, 32)
    layer = load_transformers(artifact, torch.float32, CPU).get_submodule(
        "transformer.h.0.mlp.c_fc"
    )
    assert torch.equal(layer.weight, weight.dequantize())


@pytest.mark.parametrize("family", list(MIXTURES))
def test_experts_are_linear_layers_wherever_they_are_stored(tmp_path: Path, family: str) -> None:
    artifact = saved(tmp_path, family)
    model = skeleton(artifact)
    mixture = next(n for n, m in blocks(model)[1][1].named_modules() if isinstance(m, Experts))
    layer = f"model.layers.1.{mixture}.3.gate_proj"
    assert isinstance(model.get_submodule(layer), torch.nn.Linear)
    assert resolve(model, artifact, f"{layer}.weight") == (MIXTURES[family],)
    fused = artifact.shape(MIXTURES[family])[0] == 4
    expected = layer if fused else MIXTURES[family].removesuffix(".weight")
    assert stored_layer(model, artifact, layer) == expected


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_fused_checkpoint_written_apart_is_the_same_model(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    artifact = saved(tmp_path / "fused", family)
    view = unfused(skeleton(artifact), artifact)
    assert view.weight_bytes == artifact.weight_bytes
    assert not any("_proj_bias" in name or "input_linear" in name for name in view.names())
    (tmp_path / "apart").mkdir()
    tensors = {name: view.tensor(name) for name in view.names()}
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == view.shape(name)
    save_file(tensors, tmp_path / "apart" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "apart" / "config.json").write_bytes(
        (tmp_path / "fused" / "config.json").read_bytes()
    )
    apart = read_artifact(tmp_path / "apart")
    assert unfused(skeleton(apart), apart) is apart
    tokens = torch.arange(3, 20)[None]
    one, other = (load_transformers(a, dtype, CPU)(tokens).logits for a in (artifact, apart))
    assert torch.equal(one, other)


def test_an_artifact_without_fused_tensors_is_its_own_view(tmp_path: Path) -> None:
    artifact = saved(tmp_path, "mixtral")
    assert unfused(skeleton(artifact), artifact) is artifact


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h_moe"])
def test_calibration_shows_all_tokens_and_changes_no_result(tmp_path: Path, family: str) -> None:
    model = load_transformers(saved(tmp_path, family), torch.float32, CPU)
    mixture = next(m for m in model.modules() if isinstance(m, Experts))
    seen: dict[str, list[int]] = {}
    for index in range(4):
        for leaf, layer in mixture.expert(index).named_children():
            layer.register_forward_pre_hook(
                lambda _, args, name=f"{index}.{leaf}": seen.setdefault(name, []).append(
                    len(args[0])
                )
            )
    hidden = torch.randn(6, 32)
    index = torch.tensor([[0, 1]] * 5 + [[1, 2]])  # nothing for the expert 3
    weights = torch.rand(6, 2)
    results = {}
    for calibration in (None, "routed", "all"):
        seen.clear()
        calibrate_experts(model, calibration)  # type: ignore[arg-type]
        results[calibration] = mixture(hidden, index, weights)
        layers = len(list(mixture.expert(0).children()))
        rows = {None: [5, 6, 1], "routed": [5, 6, 1, 0], "all": [6] * 4}[calibration]
        assert list(seen.values()) == [[n] for n in rows for _ in range(layers)]
    assert torch.equal(results[None], results["routed"])
    assert torch.allclose(results[None], results["all"], atol=1e-5)


def test_codes_of_an_expert_are_found_by_its_stored_name(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    stored = MIXTURES["mixtral"].removesuffix(".weight")
    artifact, weight = with_codes(tmp_path, stored, 64, 32)
    model = load_transformers(artifact, torch.float32, CPU)
    name = "model.layers.1.mlp.experts.3.gate_proj"
    assert torch.equal(model.get_submodule(name).weight, weight.dequantize())
    assert stored_layer(model, artifact, name) == stored


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    artifact = change_tensors(tmp_path, drop=MIXTURES["mixtral"])
    with pytest.raises(ArtifactError, match=r"lacks model\.layers\.1\.mlp\.experts\.3\.gate_proj"):
        skeleton(artifact)


def test_what_transformers_does_more_than_rename_is_loaded_dense_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = HrmTextConfig(**_LLAMA)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    artifact = read_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="lacks"):
        skeleton(artifact)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    found = load_transformers(artifact, torch.float32, CPU).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_blocks_are_the_outer_list(tmp_path: Path) -> None:
    model = skeleton(saved(tmp_path))
    model.model.layers[0].parts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(9))
    assert [name for name, _ in blocks(model)] == ["model.layers.0", "model.layers.1"]
    model.model.norms = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    with pytest.raises(UnsupportedError, match=r"in the lists model\.layers, model\.norms"):
        blocks(model)
