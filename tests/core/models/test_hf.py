import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.opt import OPTConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.gptq import to_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.hf import blocks, load_transformers, materialize, release, skeleton

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
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama-tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    ),
    # Their checkpoints name tensors otherwise than the model: transformers converts them.
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=64),
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_local_experts=2),
}


def saved(tmp_path: Path, family: str = "llama") -> Artifact:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).save_pretrained(
        tmp_path
    )
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
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
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


def quantized(path: Path) -> tuple[Artifact, QuantizedWeight]:
    """A saved model with one layer of 4-bit codes."""
    saved(path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    number_format = IntegerFormat(4, True, 32)
    weight = QuantizedWeight(
        codes=torch.randint(0, 16, (64, 32), dtype=torch.uint8),
        scales=torch.rand(64, 1).half(),
        zeros=torch.full((64, 1), 8, dtype=torch.uint8),
        group_index=torch.zeros(32, dtype=torch.int32),
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
