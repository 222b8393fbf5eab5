from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.opt import OPTConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.targets import Target, TargetBlock, find_targets
from infopt.core.errors import NumericsError, ResourceError, UsageError
from infopt.core.formats.number import IntegerFormat
from infopt.core.hardware.probe import probe
from infopt.core.models.hf import load_transformers, skeleton
from infopt.core.progress import Progress
from infopt.core.quantization import sensitivity
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.sensitivity import difference, measure, needed_memory, units
from infopt.core.reports.quantize import SensitivityRow

CPU = torch.device("cpu")


def form(bits: int) -> IntegerFormat:
    return IntegerFormat(bits, True, 32)


def text(vocabulary: int = 256, windows: int = 3, length: int = 20) -> Tensor:
    return torch.randint(
        3, vocabulary, (windows, length), generator=torch.Generator().manual_seed(1)
    )


def run(
    artifact: Artifact, tokens: Tensor, bits: Sequence[int], **options: Any
) -> tuple[SensitivityRow, ...]:
    ignore = options.pop("ignore", ("lm_head",))
    blocks = find_targets(skeleton(artifact), ignore)
    return measure(artifact, blocks, tokens, bits, form, device=CPU, **options)


@pytest.fixture
def make_family(tmp_path: Path, make_llama: Callable[..., Artifact]) -> Callable[[str], Artifact]:
    """Random models whose blocks are called in different ways, in float32."""

    def make(family: str) -> Artifact:
        if family == "llama":
            return make_llama(num_hidden_layers=3)
        shared = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "pad_token_id": 2,
        }
        config = {
            "opt": lambda: OPTConfig(**shared, ffn_dim=64, word_embed_proj_dim=32),
            "gemma3": lambda: Gemma3TextConfig(
                **shared,
                intermediate_size=64,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                final_logit_softcapping=5.0,
            ),
        }[family]()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / family)
        return read_artifact(tmp_path / family)

    return make


def by_hand(
    model: PreTrainedModel, layers: Sequence[str], tokens: Tensor, bits: int
) -> list[float]:
    """KL and rise of the NLL, from the whole model before and after, in float64."""

    def log_probs() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(tokens).logits.double().log_softmax(-1)
        return found

    original = log_probs()
    kept = {name: model.get_submodule(name).weight.data for name in layers}
    for name, weight in kept.items():
        assert isinstance(weight, Tensor)
        nearest = quantize_nearest(weight, form(bits), group_grids(weight, form(bits), mse=True))
        model.get_submodule(name).weight.data = nearest.dequantize()
    changed = log_probs()
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight
    kl = (original.exp() * (original - changed)).sum(-1).mean()
    following = tokens[:, 1:, None]
    rise = (original - changed)[:, :-1].gather(2, following).mean()
    return [float(kl), float(rise)]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_rows_are_what_the_whole_model_says(
    make_family: Callable[[str], Artifact], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two windows, then one: batches of unequal sizes.
    monkeypatch.setattr(sensitivity, "_BATCH_TOKENS", 40)
    artifact = make_family(family)
    tokens = text(artifact.config["vocab_size"])
    rows = run(artifact, tokens, (2, 4))
    model = load_transformers(artifact, torch.float32, CPU)
    assert len(rows) == (3 * 4 * 2)
    for row in rows:
        kl, rise = by_hand(model, row.layers, tokens, row.bits)
        assert row.kl == pytest.approx(kl, rel=2e-3, abs=1e-7)
        assert row.delta_nll == pytest.approx(rise, rel=2e-3, abs=1e-5)


def test_fewer_bits_cost_more_and_what_was_tried_leaves_no_trace(
    make_llama: Callable[..., Artifact],
) -> None:
    artifact = make_llama()
    rows = run(artifact, text(), (8, 2, 4, 3))
    assert [row.bits for row in rows[:4]] == [2, 3, 4, 8]
    for first in range(0, len(rows), 4):
        costs = [row.kl for row in rows[first : first + 4]]
        assert costs == sorted(costs, reverse=True)
        assert costs[3] >= -1e-9
    again = run(artifact, text(), (4,))
    assert again == tuple(row for row in rows if row.bits == 4)


def test_known_rows_are_not_measured_again(make_llama: Callable[..., Artifact]) -> None:
    artifact = make_llama()
    seen: list[SensitivityRow] = []
    rows = run(artifact, text(), (3, 4), found=seen.append)
    assert tuple(seen) == rows
    told: list[Progress] = []
    later: list[SensitivityRow] = []
    marked = tuple(row.model_copy(update={"kl": 7.0}) for row in rows[:5])
    resumed = run(artifact, text(), (3, 4), known=marked, found=later.append, progress=told.append)
    assert resumed == marked + rows[5:]
    assert tuple(later) == rows[5:]
    measuring = [one for one in told if one.stage == "measuring sensitivity"]
    assert [one.done for one in measuring] == list(range(5, len(rows)))
    assert {(one.resumed, one.total) for one in measuring} == {(5, len(rows))}
    # A row of other layers under the same name is none of these.
    other = rows[0].model_copy(update={"layers": rows[0].layers[:1], "kl": 7.0})
    assert run(artifact, text(), (3, 4), known=(other,)) == rows


def test_ignored_layers_are_left_alone(make_llama: Callable[..., Artifact]) -> None:
    rows = run(make_llama(), text(), (4,), ignore=("*.mlp.*", "model.layers.0.*", "*.k_proj"))
    assert [row.unit for row in rows] == [
        "model.layers.1.self_attn.{q,v}_proj",
        "model.layers.1.self_attn.o_proj",
    ]


def test_units_are_what_engines_fuse(make_llama: Callable[..., Artifact]) -> None:
    rows = run(make_llama(), text(), (4,))
    assert [(row.unit.removeprefix("model.layers."), row.parameters) for row in rows[:5]] == [
        ("0.self_attn.{q,k,v}_proj", 64 * (64 + 32 + 32)),
        ("0.self_attn.o_proj", 64 * 64),
        ("0.mlp.{gate,up}_proj", 2 * 64 * 128),
        ("0.mlp.down_proj", 64 * 128),
        ("1.self_attn.{q,k,v}_proj", 64 * (64 + 32 + 32)),
    ]
    assert rows[0].layers == tuple(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 16), nn.Linear(8, 16)
        self.w2 = nn.Linear(16, 8)


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"in_q": nn.Linear(8, 8), "in_kv_a": nn.Linear(8, 4)})
        self.moe = nn.ModuleDict(
            {"experts": experts, "shared": nn.ModuleDict({"gate": nn.Linear(8, 32)})}
        )
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def grouped(experts: nn.Module) -> dict[str, tuple[str, ...]]:
    """The units of a block in which everything that can be is given the same input."""
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(experts)])})
    targets = tuple(
        Target(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    together = tuple(target.name for target in targets if target.inputs == 8)
    groups = [together, *((t.name,) for t in targets if t.inputs != 8)]
    found = units(model, TargetBlock("layers.0", targets), groups)
    assert sorted(name for unit in found for name in unit.layers) == sorted(
        target.name for target in targets
    )
    assert sum(unit.parameters for unit in found) == sum(t.outputs * t.inputs for t in targets)
    return {unit.name: unit.layers for unit in found}


def test_all_experts_of_a_block_are_one_unit() -> None:
    found = grouped(nn.ModuleList([Expert() for _ in range(3)]))
    assert list(found) == [
        "layers.0.attn.in_{q,kv_a}",
        "layers.0.moe.experts.*",
        "layers.0.moe.shared.gate",
        "layers.0.mlp.0",
        "layers.0.mlp.2",
    ]
    assert len(found["layers.0.moe.experts.*"]) == 9


def test_experts_that_lie_in_a_list_for_each_projection_are_one_unit() -> None:
    lists = {
        name: nn.ModuleList([nn.Linear(*sides) for _ in range(3)])
        for name, sides in (("up", (8, 16)), ("down", (16, 8)))
    }
    found = grouped(nn.ModuleDict(lists))
    assert len(found["layers.0.moe.experts.*"]) == 6


def test_a_small_difference_is_not_lost_in_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5000, generator=generator) * 4
    changed = logits + torch.randn(40, 5000, generator=generator) * 1e-3
    targets = torch.arange(40)
    targets[::7] = -1
    p, q = logits.double().log_softmax(1), changed.double().log_softmax(1)
    exact = float((p.exp() * (p - q)).sum())
    kl, rise = difference(p.float(), changed, targets)
    assert 1e-7 < exact / 40 < 1e-6
    assert kl == pytest.approx(exact, rel=1e-2)
    kept = targets >= 0
    expected = float((p - q)[kept].gather(1, targets[kept, None]).sum())
    assert rise == pytest.approx(expected, abs=1e-4)


def test_tokens_that_cannot_come_add_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, 0.0, -200.0]])
    expected = logits.log_softmax(1)
    assert difference(expected, logits, torch.tensor([0, 1]))[0] == pytest.approx(0, abs=1e-7)
    other = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 0.0, 300.0]])
    kl, _ = difference(expected, other, torch.tensor([-1, -1]))
    p = expected[1, :2].double()
    assert kl == pytest.approx(float((p.exp() * (p + 300)).sum()), rel=1e-6)


def test_weights_beyond_a_scale_name_the_unit(make_llama: Callable[..., Artifact]) -> None:
    artifact = make_llama()
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 3e6
    model.save_pretrained(artifact.path)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj: weights too large"):
        run(read_artifact(artifact.path), text(), (4,))


def test_predictions_that_are_not_finite_name_the_unit(
    make_llama: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weight: Tensor, form: IntegerFormat, grid: Any) -> Any:
        found = quantize_nearest(weight, form, grid)
        return replace(found, scales=found.scales * torch.inf) if len(weight) == 128 else found

    monkeypatch.setattr(sensitivity, "quantize_nearest", broken)
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.\{gate,up\}_proj in 4 bits"):
        run(make_llama(), text(), (4,))


def test_a_broken_original_is_named_before_anything_is_measured(
    make_llama: Callable[..., Artifact],
) -> None:
    artifact = make_llama()
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(artifact.path)
    with pytest.raises(NumericsError, match="the logits of tiny are not finite in float32"):
        run(read_artifact(artifact.path), text(), (4,))
    model.model.norm.weight.data.fill_(1.0)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    model.save_pretrained(artifact.path)
    with pytest.raises(NumericsError, match=r"model\.layers\.1 of tiny"):
        run(read_artifact(artifact.path), text(), (4,))


def test_a_model_beyond_the_memory_is_refused_before_it_is_read(
    make_llama: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_llama()
    blocks = find_targets(skeleton(artifact), ("lm_head",))
    needed = needed_memory(skeleton(artifact), blocks, text().numel(), torch.float32)
    small = replace(probe(), memory_available_bytes=needed - 1)
    monkeypatch.setattr(sensitivity, "probe", lambda: small)
    monkeypatch.setattr(Artifact, "tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ResourceError, match=r"tiny on 60 tokens .* and \d+ are free"):
        run(artifact, text(), (4,))


def test_memory_counts_weights_and_text(make_llama: Callable[..., Artifact]) -> None:
    artifact = make_llama()
    model = skeleton(artifact)
    blocks = find_targets(model, ("lm_head",))
    few, many = (needed_memory(model, blocks, n, torch.float32) for n in (1000, 2000))
    # Each token: its log-probabilities, and its states before and after both blocks.
    assert many - few >= 1000 * 4 * (256 + 3 * 64)
    assert few >= 2 * artifact.weight_bytes, "stored in 16 bits, held in 32"


def test_no_widths_are_refused(make_llama: Callable[..., Artifact]) -> None:
    with pytest.raises(UsageError, match="no widths"):
        run(make_llama(), text(), ())


def test_experts_are_measured_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=None,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    artifact = read_artifact(tmp_path)
    rows = run(artifact, text(64), (2, 8))
    first = [row for row in rows if row.unit.startswith("model.layers.0.") and row.bits == 2]
    assert [row.unit.removeprefix("model.layers.0.") for row in first] == [
        "self_attn.{q,k,v}_proj",
        "self_attn.o_proj",
        "mlp.experts.*",
    ]
    assert first[2].parameters == 4 * 3 * 32 * 64 and len(first[2].layers) == 12
    # Float32 rounds a KL of nothing to either side of 0.
    assert all(rows[i].kl > rows[i + 1].kl > -1e-8 for i in range(0, len(rows), 2))
