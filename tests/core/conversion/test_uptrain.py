"""Fewer key/value heads, from the door: what is written, what it computes, and its training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.conversion.grouped_query import pool_rows, spread_heads, spread_rows
from infopt.core.conversion.kv_heads import convert_kv_heads, plan_kv_heads
from infopt.core.conversion.kv_job import Part, resolve_kv
from infopt.core.errors import ResumeError, UnsupportedError, UsageError
from infopt.core.models.config import ModelConfig
from infopt.core.models.hf import load_transformers
from infopt.core.models.load import load_decoder
from infopt.core.profiling.shape import shape_of
from infopt.core.profiling.static import kv_bytes_per_token
from infopt.core.progress import Progress
from infopt.core.recipe.base import validated
from infopt.core.recipe.kv_heads import KvHeadsSettings
from infopt.core.runtime.kv_cache import block_bytes

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
}


def save(model: PreTrainedModel, path: Path) -> Artifact:
    model.save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])
    fast.save_pretrained(path)
    return read_artifact(path)


def made(tmp_path: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Artifact:
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):  # they are made as zeros
                value.normal_()
    return save(model, tmp_path / kind)


def settings(kv_heads: int, **changes: Any) -> KvHeadsSettings:
    values = {"kv_heads": kv_heads, "device": "cpu", "dtype": "float32"} | changes
    return KvHeadsSettings.model_validate(values)


def training(text: Path, **changes: Any) -> KvHeadsSettings:
    words: dict[str, Any] = {
        "uptrain": 6,
        "sequence_length": 32,
        "batch_tokens": 256,
        "micro_tokens": 128,
        "text": str(text),
        "precision": "float32",
    }
    return settings(2, **(words | changes))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i % 97} is number {i * i % 1009}." for i in range(2000)))
    return file


def tokens() -> Tensor:
    return torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(7))


def plain_logits(path: Path) -> Tensor:
    """As transformers alone loads and computes them."""
    model, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens()).logits
        return logits


@pytest.mark.parametrize("kind", KINDS)
def test_equal_heads_are_joined_without_loss(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
            if name.split(".")[-2] in ("k_proj", "v_proj"):
                value.copy_(spread_heads(value[: 2 * 8], 4, 2))
            if "qkv_proj" in name:
                few = torch.cat([value[:64], value[64:80], value[96:112]])
                value.copy_(spread_rows(few, 4, 2, before=64))
    source = save(model, tmp_path / kind)
    report = convert_kv_heads(source, tmp_path / "out", settings(2))
    wanted, found = plain_logits(source.path), plain_logits(tmp_path / "out")
    assert torch.allclose(found, wanted, atol=1e-4)
    assert all(layer.spread == 0 for layer in report.layers) and report.layers
    assert report.perplexity.converted == pytest.approx(report.perplexity.dense, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_are_the_means_of_their_group(tmp_path: Path, kind: str, groups: int) -> None:
    source = made(tmp_path, kind)
    report = convert_kv_heads(source, tmp_path / "out", settings(groups))
    verify_manifest(tmp_path / "out")
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"
    written = read_artifact(tmp_path / "out")
    assert written.config == source.config | {"num_key_value_heads": groups}
    changed = {layer.name for layer in report.layers}
    for name in source.names():
        before, after = source.tensor(name), written.tensor(name)
        if name not in changed:
            assert torch.equal(before, after)
            continue
        if "qkv_proj" in name:
            assert torch.equal(before[:64], after[:64])
            before, after = before[64:].view(2, 32, -1), after[64:].view(2, groups * 8, -1)
        else:
            before, after = before[None], after[None]
        shape = (len(before), groups, 4 // groups, 8, *before.shape[2:])
        wanted = before.double().view(shape).mean(2).flatten(1, 2).to(torch.bfloat16)
        assert torch.equal(after, wanted)
    assert all(layer.spread > 0.1 for layer in report.layers)
    assert report.perplexity.uptrained is None and report.uptrain_steps == 0
    assert report.bytes == written.weight_bytes < source.weight_bytes
    # Keys and values, two layers, heads of eight channels, two bytes each.
    assert report.original_kv_bytes_per_token == 2 * 2 * 4 * 8 * 2
    assert report.kv_bytes_per_token == 2 * 2 * groups * 8 * 2


def test_as_many_heads_as_there_are_change_nothing(tmp_path: Path) -> None:
    source = made(tmp_path)
    report = convert_kv_heads(source, tmp_path / "out", settings(4))
    written = read_artifact(tmp_path / "out")
    assert written.names() == source.names()
    for name in source.names():
        bits = [a.tensor(name).view(torch.uint8) for a in (source, written)]
        assert torch.equal(*bits)
    assert report.perplexity.converted == report.perplexity.dense
    assert report.kv_bytes_per_token == report.original_kv_bytes_per_token
    assert "already" in report.warnings[0]


def test_one_head_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_key_value_heads": 1})))
    source = save(model, tmp_path / "one")
    report = convert_kv_heads(source, tmp_path / "out", settings(1))
    written = read_artifact(tmp_path / "out")
    assert all(torch.equal(written.tensor(n), source.tensor(n)) for n in source.names())
    # Keys and values, two layers, a head of eight channels, four bytes each.
    assert report.kv_bytes_per_token == report.original_kv_bytes_per_token == 2 * 2 * 8 * 4
    assert "already" in report.warnings[0] and report.layers == ()


def test_the_cache_shrinks_in_profile_and_runtime(tmp_path: Path) -> None:
    source = made(tmp_path, "qwen3")
    report = convert_kv_heads(source, tmp_path / "out", settings(1))
    written = read_artifact(tmp_path / "out")
    old, new = (ModelConfig.from_hf(a.config) for a in (source, written))
    counted = [kv_bytes_per_token(shape_of(a.config), 2) for a in (source, written)]
    assert counted == [4 * report.kv_bytes_per_token, report.kv_bytes_per_token]
    sizes = [block_bytes(config, 16, torch.float32) for config in (old, new)]
    assert sizes[0] == 4 * sizes[1]
    assert load_decoder(written, torch.float32, CPU).config.kv_heads == 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=256)),
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=256,
                word_embed_proj_dim=32,
            )
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_a_config_without_the_word_is_refused(
    tmp_path: Path, model: Callable[[], PreTrainedModel]
) -> None:
    source = save(model(), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="has no num_key_value_heads"):
        convert_kv_heads(source, tmp_path / "out", settings(2))


@pytest.mark.parametrize("heads", [3, 8])
def test_heads_that_do_not_divide_are_refused(tmp_path: Path, heads: int) -> None:
    with pytest.raises(UsageError, match=r"divides them: 1, 2, 4|cannot become 8"):
        convert_kv_heads(made(tmp_path), tmp_path / "out", settings(heads))
    assert not list(tmp_path.glob("*out*"))


def test_rows_that_are_not_what_they_seem_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Had the fused rows been laid out otherwise, keys first, the proof must say so."""

    def keys_first(part: Part, value: Tensor, heads: int, groups: int, *, spread: bool) -> Tensor:
        count = 2 * (groups if spread else heads) * 8
        turned = torch.cat([value[count:], value[:count]])
        change = spread_rows if spread else pool_rows
        return torch.cat([change(turned, heads, groups, before=64)[64:], value[count:]])

    monkeypatch.setattr(Part, "pool", lambda *args: keys_first(*args, spread=False))
    monkeypatch.setattr(Part, "spread", lambda *args: keys_first(*args, spread=True))
    with pytest.raises(UnsupportedError, match="laid out in a way"):
        convert_kv_heads(made(tmp_path, "phi3"), tmp_path / "out", settings(2))
    assert not list(tmp_path.glob("*out*")), "there is nothing to come back to"


def test_uptraining_comes_nearer_to_the_original(tmp_path: Path, text: Path) -> None:
    source = made(tmp_path)
    wanted = training(text, uptrain=30, learning_rate=3e-3)
    report = convert_kv_heads(source, tmp_path / "out", wanted)
    assert report.uptrain_steps == 30 and len(report.losses) == 30
    assert report.losses[-1] < 0.7 * report.losses[0]
    assert report.held_out[-1].loss < report.held_out[0].loss
    assert report.logits_max_difference == pytest.approx(0, abs=1e-4)
    written = read_artifact(tmp_path / "out")
    assert written.config["num_key_value_heads"] == 2
    assert {written.dtype(name) for name in written.names()} == {"bfloat16"}
    distances = []
    original = load_transformers(source, torch.float32, CPU)(input_ids=tokens()).logits
    plain = tmp_path / "plain"
    convert_kv_heads(source, plain, settings(2))
    for path in (plain, tmp_path / "out"):
        logits = plain_logits(path)
        kl = original.log_softmax(-1).exp() * (original.log_softmax(-1) - logits.log_softmax(-1))
        distances.append(float(kl.sum(-1).mean()))
    assert distances[1] < distances[0]


def test_an_interrupted_uptraining_goes_on_to_the_same_bytes(tmp_path: Path, text: Path) -> None:
    source, wanted = made(tmp_path), training(text)
    whole = convert_kv_heads(source, tmp_path / "whole", wanted)

    def stop(progress: Progress) -> None:
        if progress.stage == "training" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_kv_heads(source, tmp_path / "out", wanted, progress=stop)
    with pytest.raises(ResumeError, match="unfinished"):
        convert_kv_heads(source, tmp_path / "out", wanted)
    with pytest.raises(ResumeError, match="kv_heads"):
        other = wanted.model_copy(update={"kv_heads": 1})
        convert_kv_heads(source, tmp_path / "out", other, resume=True)
    report = convert_kv_heads(source, tmp_path / "out", wanted, resume=True)
    assert report.resumed_steps == 3 and report.losses == whole.losses
    files = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert not list(tmp_path.glob(".out*"))


def test_settings_that_nothing_reads_are_refused() -> None:
    for values, word in (
        ({"kv_heads": 2, "learning_rate": 0.1}, "learning_rate is read by uptrain only"),
        ({"kv_heads": 2, "text": "x.txt"}, "text is read by uptrain only"),
        ({"kv_heads": 0}, "greater than or equal to 1"),
        ({"kv_heads": 2, "uptrain": 5, "micro_tokens": 9999}, "micro_tokens 9999"),
        ({"kv_heads": 2, "uptrian": 5}, "unknown key"),
    ):
        with pytest.raises(UsageError, match=word):
            validated(KvHeadsSettings, values, "a test")


def test_the_plan_says_what_falls(tmp_path: Path) -> None:
    plan = plan_kv_heads(made(tmp_path), settings(1, uptrain=10))
    assert "join 4 key/value heads into 1 in 2 layers" in plan.actions[0]
    assert "64 bytes a token instead of 256" in plan.actions[1]
    assert any("uptrain 10 steps" in action for action in plan.actions)
    assert plan.memory_bytes > 0 and plan.disk_bytes > 0


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path)
    source.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedError, match="quantized"):
        resolve_kv(source, settings(2))
