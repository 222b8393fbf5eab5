"""A smaller checkpoint computes what the larger one does without the parts that were cut."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma import GemmaConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.anatomy import Anatomy, anatomy
from infopt.core.compression.magnitude import largest, magnitudes
from infopt.core.compression.replay import replace_forward
from infopt.core.compression.shrink import Kept, shrink
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.models.hf import blocks, load_transformers

FAMILIES = ["llama", "qwen3", "phi3", "gemma3", "opt", "gpt2"]
TOKENS = torch.arange(3, 27).reshape(2, 12)


def written(artifact: Artifact, parts: Anatomy, kept: Kept, path: Path) -> Artifact:
    small = shrink(artifact, parts, kept)
    found = write_artifact(path, source=artifact, tensors=small.tensors(), config=small.config)
    assert found.summary().parameters == small.parameters
    return found


def logits(artifact: Artifact) -> Tensor:
    """As plain transformers computes them, nothing missing and nothing left over."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        artifact.path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    faults = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(loading[fault] for fault in faults)
    return run(model.eval())


@torch.no_grad()
def run(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def loaded(artifact: Artifact) -> PreTrainedModel:
    return load_transformers(artifact, torch.float32, torch.device("cpu"))


def silence(model: PreTrainedModel, layer: str, columns: Sequence[int]) -> None:
    weight = model.get_parameter(f"{layer}.weight")
    weight.data[:, list(columns)] = 0.0


def skip(stack: ExitStack, model: PreTrainedModel, index: int) -> None:
    block: nn.Module = blocks(model)[index][1]
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = plain(*args, **kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    replace_forward(stack, block, forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_are_cut_are_as_silent_ones(
    make_model: Callable[[str], Artifact], tmp_path: Path, family: str
) -> None:
    artifact = make_model(family)
    parts = anatomy(artifact)
    layers = tuple(range(len(parts.blocks)))
    kept = tuple(tuple(range(index, parts.ffn_size, 2)) for index in layers[:1] * len(layers))
    small = written(artifact, parts, Kept(layers, ffn=kept), tmp_path / "small")
    model = loaded(artifact)
    for index in layers:
        block = parts.blocks[index]
        assert block.ffn is not None
        silence(model, block.ffn.writer, [c for c in range(parts.ffn_size) if c not in kept[index]])
    torch.testing.assert_close(logits(small), run(model), atol=1e-4, rtol=1e-4)
    assert small.summary().parameters < artifact.summary().parameters


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_groups_of_heads_that_are_cut_are_as_silent_ones(
    make_model: Callable[[str], Artifact], tmp_path: Path, family: str
) -> None:
    artifact = make_model(family)
    parts = anatomy(artifact)
    layers = tuple(range(len(parts.blocks)))
    kept = tuple(((index + 1) % 2,) for index in layers)  # of two groups
    small = written(artifact, parts, Kept(layers, heads=kept), tmp_path / "small")
    model = loaded(artifact)
    for index in layers:
        block = parts.blocks[index]
        assert block.heads is not None
        silence(model, block.heads.writer, range(16 * (index % 2), 16 * (index % 2) + 16))
    torch.testing.assert_close(logits(small), run(model), atol=1e-4, rtol=1e-4)
    assert small.config["num_attention_heads"] == 2
    assert small.config["num_key_value_heads"] == 1
    assert small.config["head_dim"] == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_cut_are_as_skipped_ones(
    make_model: Callable[[str], Artifact], tmp_path: Path, family: str
) -> None:
    artifact = make_model(family)
    parts = anatomy(artifact)
    last = len(parts.blocks) - 1
    kept = tuple(index for index in range(last + 1) if index != last - 1)
    small = written(artifact, parts, Kept(kept), tmp_path / "small")
    model = loaded(artifact)
    with ExitStack() as stack:
        skip(stack, model, last - 1)
        torch.testing.assert_close(logits(small), run(model), atol=1e-4, rtol=1e-4)
    if family == "gemma3":
        assert small.config["layer_types"] == ["sliding_attention", "sliding_attention"]


def test_all_at_once(make_model: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = make_model("llama")
    parts = anatomy(artifact)
    ffn, heads = tuple(range(8, 40)), ((1,), (0,))
    small = written(artifact, parts, Kept((0, 2), heads=heads, ffn=(ffn, ffn)), tmp_path / "small")
    model = loaded(artifact)
    silence(model, "model.layers.0.self_attn.o_proj", range(16))
    silence(model, "model.layers.2.self_attn.o_proj", range(16, 32))
    for index in (0, 2):
        rest = [c for c in range(64) if c not in ffn]
        silence(model, f"model.layers.{index}.mlp.down_proj", rest)
    with ExitStack() as stack:
        skip(stack, model, 1)
        torch.testing.assert_close(logits(small), run(model), atol=1e-4, rtol=1e-4)


def empty_channels(artifact: Artifact, parts: Anatomy, gone: Sequence[int], path: Path) -> Artifact:
    """The model with nothing in some channels of its stream: no embedding, no writer fills them."""
    model = loaded(artifact)
    writers = {g.writer for b in parts.blocks for g in (b.heads, b.ffn) if g is not None}
    for axis in parts.hidden:
        layer = axis.parameter.rpartition(".")[0]
        module = model.get_submodule(layer)
        if layer in writers or isinstance(module, nn.Embedding):
            model.get_parameter(axis.parameter).data.index_fill_(
                axis.axis, torch.tensor(list(gone)), 0.0
            )
    model.save_pretrained(path)
    return read_artifact(path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_hidden_channels_that_are_empty_can_go(
    make_model: Callable[[str], Artifact], tmp_path: Path, family: str
) -> None:
    if family == "gemma":
        config = GemmaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
        )
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.2)
        whole.save_pretrained(tmp_path / "gemma")
        artifact = read_artifact(tmp_path / "gemma")
    else:
        artifact = make_model(family)
    parts = anatomy(artifact)
    kept = tuple(c for c in range(32) if c % 4)
    emptied = empty_channels(
        artifact, parts, [c for c in range(32) if not c % 4], tmp_path / "emptied"
    )
    norms = {
        axis.parameter.removesuffix(".weight"): math.sqrt(32 / 24)
        for axis in parts.hidden
        if "norm" in axis.parameter
    }
    layers = tuple(range(len(parts.blocks)))
    small = written(emptied, parts, Kept(layers, hidden=kept, gains=norms), tmp_path / "small")
    assert small.config["hidden_size"] == 24
    assert small.config["head_dim"] == 8
    torch.testing.assert_close(logits(small), run(loaded(emptied)), atol=1e-3, rtol=1e-3)


def test_widths_that_hang_together_are_cut_together(
    make_model: Callable[[str], Artifact], tmp_path: Path
) -> None:
    for family in ("gpt2", "opt"):
        artifact = make_model(family)
        parts = anatomy(artifact)
        layers = tuple(range(len(parts.blocks)))
        half = tuple(range(parts.kv_groups // 2))
        with pytest.raises(UnsupportedError, match="cannot have this shape"):
            shrink(artifact, parts, Kept(layers, heads=(half,) * len(layers)))
        with pytest.raises(UnsupportedError, match="cannot have this shape"):
            shrink(artifact, parts, Kept(layers, hidden=tuple(range(16))))
        both = Kept(layers, heads=(half,) * len(layers), hidden=tuple(range(0, 32, 2)))
        small = written(artifact, parts, both, tmp_path / f"{family}-small")
        assert bool(torch.isfinite(logits(small)).all())
        position = next(n for n in artifact.names() if "wpe" in n or "positions" in n)
        torch.testing.assert_close(small.tensor(position), artifact.tensor(position)[:, ::2])


def test_layers_with_experts_are_cut_whole(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "moe")
    artifact = read_artifact(tmp_path / "moe")
    parts = anatomy(artifact)
    small = written(artifact, parts, Kept((0, 2)), tmp_path / "small")
    whole = loaded(artifact)
    with ExitStack() as stack:
        skip(stack, whole, 1)
        torch.testing.assert_close(logits(small), run(whole), atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        shrink(artifact, parts, Kept((0, 1, 2), hidden=tuple(range(16))))


def test_what_does_not_fit_is_refused(make_model: Callable[[str], Artifact]) -> None:
    artifact = make_model("llama")
    parts = anatomy(artifact)
    for kept in (
        Kept(()),
        Kept((0, 3)),
        Kept((1, 0)),
        Kept((0, 1), heads=((0,),)),
        Kept((0, 1), heads=((0,), (0, 1))),
        Kept((0, 1), ffn=((0,), (64,))),
    ):
        with pytest.raises(UsageError):
            shrink(artifact, parts, kept)


def test_a_depth_cut_changes_nothing_else_of_the_config(
    make_model: Callable[[str], Artifact],
) -> None:
    artifact = make_model("llama")
    small = shrink(artifact, anatomy(artifact), Kept((0, 2)))
    assert small.config == artifact.config | {"num_hidden_layers": 2}
    names = [name for name, _ in small.tensors()]
    assert names == [name for name, _ in small.tensors()]
    assert not any(".2." in name for name in names)


def test_magnitudes_are_sums_of_squares(make_model: Callable[[str], Artifact]) -> None:
    artifact = make_model("llama")
    sizes = magnitudes(artifact, anatomy(artifact))
    name = "model.layers.1"
    q, k, v, o = (artifact.tensor(f"{name}.self_attn.{x}_proj.weight") for x in "qkvo")
    first = sum(float(t.square().sum()) for t in (q[:16], k[:8], v[:8], o[:, :16]))
    assert float(sizes.heads[1][0]) == pytest.approx(first, rel=1e-5)
    gate, up, down = (
        artifact.tensor(f"{name}.mlp.{x}_proj.weight") for x in ("gate", "up", "down")
    )
    ffn = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
    torch.testing.assert_close(sizes.ffn[1], ffn, rtol=1e-5, atol=1e-5)
    assert sizes.hidden.shape == (32,)
    # GPT-2 stores its layers transposed.
    gpt = make_model("gpt2")
    fc, proj = (gpt.tensor(f"transformer.h.0.mlp.{x}.weight") for x in ("c_fc", "c_proj"))
    bias = gpt.tensor("transformer.h.0.mlp.c_fc.bias")
    expected = fc.square().sum(0) + proj.square().sum(1) + bias.square()
    torch.testing.assert_close(magnitudes(gpt, anatomy(gpt)).ffn[0], expected)


def test_largest() -> None:
    assert largest(torch.tensor([1.0, 5.0, 3.0, 5.0]), 3) == (1, 2, 3)
    assert largest(torch.tensor([2.0, 2.0, 2.0]), 2) == (0, 1)
