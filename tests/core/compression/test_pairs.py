from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.bloom import BloomConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from infopt.core.artifact.read import read_artifact
from infopt.core.compression.pairs import Pair, find_pairs, scale_pair
from infopt.core.compression.targets import Target, find_targets
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError

CPU = torch.device("cpu")
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GATED = {**BASE, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPT = {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GATED),
    "llama-mha": lambda: LlamaConfig(**(GATED | {"num_key_value_heads": 4})),
    "llama-mqa": lambda: LlamaConfig(**(GATED | {"num_key_value_heads": 1}), attention_bias=True),
    "llama-bias": lambda: LlamaConfig(
        **(GATED | {"num_key_value_heads": 4}), attention_bias=True, mlp_bias=True
    ),
    "qwen3": lambda: Qwen3Config(**GATED, head_dim=8),
    "phi3": lambda: Phi3Config(**GATED),
    "gemma3": lambda: Gemma3TextConfig(**GATED, head_dim=8),
    "opt": lambda: OPTConfig(**OPT),
    "opt-gelu": lambda: OPTConfig(**OPT, activation_function="gelu"),
    "opt-post": lambda: OPTConfig(**OPT, do_layer_norm_before=False),
    "bloom": lambda: BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mixtral": lambda: MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=1),
}
QKV = "input_layernorm > q_proj k_proj v_proj"
FC = "final_layer_norm > fc1"
PAIRS = {
    "llama": [
        QKV,
        "v_proj > o_proj",
        "post_attention_layernorm > gate_proj up_proj",
        "up_proj > down_proj",
    ],
    "phi3": ["input_layernorm > qkv_proj", "post_attention_layernorm > gate_up_proj"],
    "gemma3": [
        QKV,
        "v_proj > o_proj",
        "pre_feedforward_layernorm > gate_proj up_proj",
        "up_proj > down_proj",
    ],
    # A ReLU lets positive factors through.
    "opt": ["self_attn_layer_norm > q_proj k_proj v_proj", "v_proj > out_proj", FC, "fc1 > fc2"],
    "opt-gelu": ["self_attn_layer_norm > q_proj k_proj v_proj", "v_proj > out_proj", FC],
    # What these norms give goes into the residual stream as well.
    "opt-post": ["v_proj > out_proj", "fc1 > fc2"],
    "bloom": [
        "input_layernorm > query_key_value",
        "post_attention_layernorm > dense_h_to_4h",
    ],
}
PAIRS |= dict.fromkeys(("llama-mha", "llama-bias", "llama-mqa", "qwen3"), PAIRS["llama"])
REPEATS = {"llama": 2, "llama-mqa": 4, "qwen3": 2, "gemma3": 2}
"""How many queries read one value."""

MakeWalk = Callable[..., Walk]


@pytest.fixture
def make_walk(tmp_path: Path) -> MakeWalk:
    """A walk before the loaded first block of a random model, norms and biases random too."""

    def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Walk:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / family)
        tokens = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
        walk = Walk(read_artifact(tmp_path / family), tokens, (), dtype, CPU, **options)
        walk.start()
        walk.load()
        return walk

    return make


def targets_of(walk: Walk, *ignore: str) -> tuple[Target, ...]:
    return find_targets(walk.model, ("lm_head", *ignore))[0].targets


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def source_channels(walk: Walk, pair: Pair) -> int:
    return walk.layer(pair.layers[0]).in_features // pair.repeat


def shown(pairs: list[Pair]) -> list[str]:
    return [f"{leaf(p.source)} > {' '.join(leaf(layer) for layer in p.layers)}" for p in pairs]


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pairs_of_a_family(make_walk: MakeWalk, family: str, dtype: torch.dtype) -> None:
    walk = make_walk(family, dtype)
    before = walk.run_probe()
    pairs = find_pairs(walk, 0, targets_of(walk))
    assert shown(pairs) == PAIRS[family]
    kinds = {p.kind for p in pairs if "norm" in leaf(p.source)}
    assert kinds <= {"norm"} and all(p.kind == "linear" for p in pairs if "proj" in p.source)
    for pair in pairs:
        grouped = leaf(pair.source) == "v_proj" and family in REPEATS
        expected = (REPEATS[family], 8) if grouped else (1, None)
        assert (pair.repeat, pair.width) == expected
    assert torch.equal(walk.run_probe(), before), "finding leaves no trace"


@pytest.mark.parametrize("family", PAIRS)
def test_scaling_preserves_the_function(make_walk: MakeWalk, family: str) -> None:
    walk = make_walk(family)
    expected = walk.run_probe()
    former = {name: p.clone() for name, p in walk.block.named_parameters()}
    changed: set[str] = set()
    generator = torch.Generator().manual_seed(2)
    for pair in find_pairs(walk, 0, targets_of(walk)):
        scales = torch.exp(torch.randn(source_channels(walk, pair), generator=generator))
        names = scale_pair(walk, pair, scales)
        assert {f"{n}.weight" for n in (pair.source, *pair.layers)} <= set(names)
        changed.update(names)
    found = walk.run_probe()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    for local, parameter in walk.block.named_parameters():
        name = f"{walk.names[0]}.{local}"
        assert torch.equal(parameter, former[local]) == (name not in changed), name


def test_a_wrong_candidate_is_refused(make_walk: MakeWalk) -> None:
    """gate has the shapes of up, but a SiLU is between it and down."""
    walk = make_walk("llama")
    pairs = find_pairs(walk, 0, targets_of(walk, "*.up_proj"))
    assert shown(pairs) == PAIRS["llama"][:2], "nor may the norm be scaled: up reads it too"


def test_keys_are_no_values(make_walk: MakeWalk) -> None:
    """k has the shape of v, and reaches o by way of the softmax."""
    walk = make_walk("llama")
    pairs = find_pairs(walk, 0, targets_of(walk, "*.v_proj", "*.mlp.*"))
    assert shown(pairs) == []


def test_the_channels_of_grouped_queries() -> None:
    """Two heads of values, three channels each, each read by two heads of queries."""
    pair = Pair("v", ("o",), "linear", repeat=2, width=3)
    assert pair.channels(12).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert Pair("norm", ("q",), "norm").channels(4).tolist() == [0, 1, 2, 3]


def test_a_layer_that_is_left_alone_keeps_its_norm(make_walk: MakeWalk) -> None:
    walk = make_walk("llama-mha")
    pairs = find_pairs(walk, 0, targets_of(walk, "*.q_proj", "*.o_proj"))
    assert shown(pairs) == PAIRS["llama-mha"][2:]


def test_what_the_probe_cannot_tell_is_no_pair(make_walk: MakeWalk) -> None:
    walk = make_walk("llama-mha")
    walk.layer(f"{walk.names[0]}.self_attn.o_proj").weight.zero_()
    assert shown(find_pairs(walk, 0, targets_of(walk))) == PAIRS["llama-mha"][2:]


def test_a_norm_before_a_router_is_left_alone(make_walk: MakeWalk) -> None:
    walk = make_walk("mixtral", experts="all")
    targets = targets_of(walk)
    assert sum("experts" in t.name for t in targets) == 12, "what this is about"
    expected = walk.run_probe()
    pairs = find_pairs(walk, 0, targets)
    assert shown(pairs) == [QKV, "v_proj > o_proj"] + ["up_proj > down_proj"] * 4
    assert len({pair.source for pair in pairs}) == 6
    for pair in pairs:
        scale_pair(walk, pair, torch.linspace(0.5, 3.0, source_channels(walk, pair)))
    assert float((walk.run_probe() - expected).norm() / expected.norm()) < 1e-5


def test_scales_that_cannot_be_are_refused_and_change_nothing(make_walk: MakeWalk) -> None:
    walk = make_walk("llama", torch.float16)
    pair = find_pairs(walk, 0, targets_of(walk))[0]
    former = {name: p.clone() for name, p in walk.block.named_parameters()}
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NumericsError, match="input_layernorm"):
            scale_pair(walk, pair, torch.ones(32).index_fill(0, torch.tensor(3), value))
    with pytest.raises(NumericsError, match="does not fit into float16"):
        scale_pair(walk, pair, torch.full((32,), 1e7))
    assert all(torch.equal(p, former[name]) for name, p in walk.block.named_parameters())
