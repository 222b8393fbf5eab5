"""A rotated artifact: the same logits, no outliers, all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.compression.streams import find_residual
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.progress import Progress
from infopt.core.quantization import rotate as module
from infopt.core.quantization.rotate import check_rotatable, rotate

SHAPE: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
KINDS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=False),
    "phi3": dict(model_type="phi3", tie_word_embeddings=False),
    "gemma": dict(model_type="gemma", head_dim=16),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, tie_word_embeddings=False),
}
# The rounding of weights alone, as a share of the logits' spread: measured 1.7e-6, 2.2e-3, 2.1e-2.
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
Make = Callable[..., Artifact]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Artifact:
        torch.manual_seed(0)
        config = AutoConfig.for_model(**SHAPE | KINDS.get(kind, {}) | changes)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        model.to(dtype).save_pretrained(tmp_path / "model")
        return read_artifact(tmp_path / "model")

    return make


def logits(path: Path) -> Tensor:
    """By transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(30).reshape(2, 15)).logits
    return found


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kind", list(KINDS))
def test_transformers_reads_the_same_logits(
    make: Make, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    artifact = make(kind, dtype)
    result = rotate(artifact, tmp_path / "out", seed=1)
    verify_manifest(tmp_path / "out")
    expected = logits(artifact.path)
    gap = logits(tmp_path / "out") - expected
    assert float(gap.square().mean().sqrt() / expected.std()) < ROUNDING[dtype]
    assert result.logits_difference < ROUNDING[dtype] and result.value_layers == 2
    written = result.artifact
    for name in artifact.names():
        assert written.dtype(name) == artifact.dtype(name)
        assert written.shape(name) == artifact.shape(name)
        if "norm" in name:
            assert bool((written.tensor(name) == (0.0 if kind == "gemma" else 1.0)).all())
        elif len(artifact.shape(name)) == 2:
            assert not torch.equal(written.tensor(name), artifact.tensor(name))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_tied_embeddings_come_apart_and_that_is_said(make: Make, tmp_path: Path, kind: str) -> None:
    artifact = make(kind)
    assert not artifact.has("lm_head.weight")
    result = rotate(artifact, tmp_path / "out", seed=1)
    assert result.untied
    written = result.artifact
    assert written.config["tie_word_embeddings"] is False
    assert set(written.names()) == {*artifact.names(), "lm_head.weight"}
    assert not torch.equal(
        written.tensor("lm_head.weight"), written.tensor("model.embed_tokens.weight")
    )


def test_untied_ones_stay_so(make: Make, tmp_path: Path) -> None:
    artifact = make("qwen2")
    result = rotate(artifact, tmp_path / "out", seed=1)
    assert not result.untied and result.artifact.names() == artifact.names()


def planted(artifact: Artifact) -> Artifact:
    """One channel of the stream is a thousand times the others, as in trained models."""
    weights = load_file(artifact.path / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("embed_tokens.weight"):
            value[:, 5] *= 1000
    save_file(weights, artifact.path / "model.safetensors", {"format": "pt"})
    return read_artifact(artifact.path)


def layer_inputs(path: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "gate_proj")):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].detach())
            )
    model(input_ids=torch.arange(30).reshape(2, 15))
    return seen


def test_planted_outliers_are_gone(make: Make, tmp_path: Path) -> None:
    artifact = planted(make("llama", hidden_size=64, tie_word_embeddings=False))
    rotate(artifact, tmp_path / "out", seed=1)
    before, after = layer_inputs(artifact.path), layer_inputs(tmp_path / "out")

    def peak(x: Tensor) -> float:
        return float(x.abs().max() / x.square().mean().sqrt())

    def kurtosis(x: Tensor) -> float:
        return float(x.pow(4).mean() / x.square().mean().square())

    for name, value in before.items():
        assert peak(value) > 6 and kurtosis(value) > 20
        assert peak(after[name]) < 4 and kurtosis(after[name]) < 5


def test_the_seed_is_all_there_is_to_chance(make: Make, tmp_path: Path) -> None:
    artifact = make()
    same = [rotate(artifact, tmp_path / name, seed=4).artifact for name in ("a", "b")]
    assert same[0].fingerprint() == same[1].fingerprint()
    other = rotate(artifact, tmp_path / "c", seed=5).artifact
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(other.tensor(name), same[0].tensor(name))


def test_progress_counts_the_tensors(make: Make, tmp_path: Path) -> None:
    seen: list[Progress] = []
    artifact = make()
    rotate(artifact, tmp_path / "out", seed=1, progress=seen.append)
    counted = [p.done for p in seen if p.stage == "rotating"]
    assert counted == list(range(len(artifact.names()) + 2)), "the head is one more"
    assert {p.total for p in seen if p.stage == "rotating"} == {len(artifact.names()) + 1}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_logits_that_differ_leave_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make()
    name = "model.layers.1.mlp.down_proj.weight"
    found = find_residual(artifact)  # its proof would see it first
    monkeypatch.setattr(module, "find_residual", lambda _: found)
    apply = module.Turn.apply

    def forgetful(self: Any, parameter: str, value: Tensor, gain: Any) -> Tensor:
        return value if parameter == name else apply(self, parameter, value, gain)

    monkeypatch.setattr(module.Turn, "apply", forgetful)
    with pytest.raises(NumericsError, match="computes other logits"):
        rotate(artifact, tmp_path / "out", seed=1)
    assert files(tmp_path) == {"model"}


def test_weights_that_are_not_finite_are_named(make: Make, tmp_path: Path) -> None:
    artifact = make()
    weights = load_file(artifact.path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, artifact.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj"):
        rotate(read_artifact(artifact.path), tmp_path / "out", seed=1)
    assert files(tmp_path) == {"model"}


def test_what_cannot_be_rotated_is_refused_before_any_work(make: Make, tmp_path: Path) -> None:
    artifact = make("opt", model_type="opt", ffn_dim=80, word_embed_proj_dim=48)
    seen: list[Progress] = []
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        check_rotatable(artifact)
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        rotate(artifact, tmp_path / "out", seed=1, progress=seen.append)
    assert not seen and files(tmp_path) == {"model"}


def test_a_quantized_model_is_refused(make: Make, tmp_path: Path) -> None:
    artifact = make()
    config = artifact.config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (artifact.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantized already"):
        check_rotatable(read_artifact(artifact.path))


def test_the_output_is_kept_unless_it_may_be_replaced(make: Make, tmp_path: Path) -> None:
    artifact = make()
    out = tmp_path / "out"
    first = rotate(artifact, out, seed=1).artifact.fingerprint()
    with pytest.raises(UsageError):
        rotate(artifact, out, seed=2)
    assert read_artifact(out).fingerprint() == first
    second = rotate(artifact, out, seed=2, replace=True, extra={"recipe.yaml": "name: x\n"})
    assert second.artifact.fingerprint() != first
    assert (out / "recipe.yaml").read_text() == "name: x\n"
    with pytest.raises(UsageError, match="is the model that is read"):
        rotate(second.artifact, out, seed=3, replace=True)


def test_a_rotated_model_can_be_rotated_again(make: Make, tmp_path: Path) -> None:
    artifact = make("gemma")
    once = rotate(artifact, tmp_path / "once", seed=1).artifact
    twice = rotate(once, tmp_path / "twice", seed=2)
    assert not twice.untied
    gap = logits(tmp_path / "twice") - logits(artifact.path)
    assert float(gap.abs().max()) < 1e-3
