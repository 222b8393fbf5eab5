"""What is written back is what was read, name by name, and else what was learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.models.hf import load_transformers
from infopt.core.training.artifact import trained_tensors

CHECKPOINTS = Path(__file__).parents[2] / "fixtures" / "checkpoints"
CPU = torch.device("cpu")
Make = Callable[..., Artifact]
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(
        vocab_size=256,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    ),
    "phi3": lambda: Phi3Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=False),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=2),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    ),
}


def make(family: str, folder: Path) -> Artifact:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(folder)
    return read_artifact(folder)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt", "phi3", "qwen3"])
def test_an_untrained_model_is_written_as_it_was_read(family: str, tmp_path: Path) -> None:
    artifact = make(family, tmp_path)
    model = load_transformers(artifact, torch.float32, CPU)
    found = trained_tensors(model, artifact)
    assert sorted(found) == artifact.names()
    for name, value in found.items():
        stored = artifact.tensor(name)
        assert value.dtype == stored.dtype and torch.equal(value, stored), name
        assert value.is_contiguous()


def test_dtypes_are_the_artifacts_and_tied_weights_come_once(make_llama: Make) -> None:
    artifact = make_llama()
    model = load_transformers(artifact, torch.float32, CPU)
    assert sorted(trained_tensors(model, artifact)) == artifact.names()
    assert "lm_head.weight" not in artifact.names()
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(2)
    found = trained_tensors(model, artifact, ["lm_head.weight", "model.norm.weight"])
    assert set(found) == {"model.embed_tokens.weight", "model.norm.weight"}
    expected = artifact.tensor("model.embed_tokens.weight") * 2
    assert torch.equal(found["model.embed_tokens.weight"], expected)
    assert found["model.norm.weight"].dtype == torch.bfloat16


def test_a_head_stored_beside_its_tied_table_follows_it(make_llama: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    artifact = make_llama("both")
    file = artifact.path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    artifact = read_artifact(artifact.path)
    model = load_transformers(artifact, torch.float32, CPU)
    found = trained_tensors(model, artifact, ["model.embed_tokens.weight"])
    tied = model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert tied == (set(found) == {"model.embed_tokens.weight", "lm_head.weight"})


@pytest.mark.parametrize(
    "form", ["awq", "bnb-int8", "bnb-nf4", "ct-fp8", "ct-fp8-block", "ct-w4a16", "gptq-act-order"]
)
def test_a_quantized_layer_is_named(form: str) -> None:
    artifact = read_artifact(CHECKPOINTS / form)
    model = load_transformers(artifact, torch.float32, CPU)
    with pytest.raises(UnsupportedError, match=r"weight cannot be written back: .* quantized"):
        trained_tensors(model, artifact)
    assert set(trained_tensors(model, artifact, ["model.norm.weight"])) == {"model.norm.weight"}


def test_fused_experts_are_named(tmp_path: Path) -> None:
    artifact = make("gpt_oss", tmp_path)
    model = load_transformers(artifact, torch.float32, CPU)
    with pytest.raises(UnsupportedError, match=r"experts\.0\..* fused with those of other experts"):
        trained_tensors(model, artifact)
    others = [name for name, _ in model.named_parameters() if ".experts." not in name]
    for name, value in trained_tensors(model, artifact, others).items():
        assert torch.equal(value, artifact.tensor(name)), name


def test_mistakes_are_told(make_llama: Make) -> None:
    artifact = make_llama()
    model = load_transformers(artifact, torch.float32, CPU)
    with pytest.raises(ValueError, match="no parameter nonsense"):
        trained_tensors(model, artifact, ["nonsense"])
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(NumericsError, match=r"model\.norm\.weight is not finite"):
        trained_tensors(model, artifact)
