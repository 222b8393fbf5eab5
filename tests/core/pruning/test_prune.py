import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.phi3 import Phi3Config

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import verify_manifest
from infopt.core.compression.calibration import calibration_tokens
from infopt.core.compression.quality import held_out, mean_nll
from infopt.core.errors import NumericsError, ResumeError, UnsupportedError, UsageError
from infopt.core.models.hf import load_transformers, skeleton
from infopt.core.models.unfused import unfused
from infopt.core.progress import Progress
from infopt.core.pruning.mask import keeps_pattern, zeros
from infopt.core.pruning.plan import plan_prune
from infopt.core.pruning.prune import prune
from infopt.core.recipe.prune import PruneSettings, parse_pattern
from infopt.core.reports.prune import PrunedPart, PruneReport

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]
METHODS = ["magnitude", "wanda", "sparsegpt"]


def settings(calibration_file: Path, **changes: Any) -> PruneSettings:
    calibration = {"text": str(calibration_file), "samples": 16, "sequence_length": 32}
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu"}
    return PruneSettings.model_validate(values | changes)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def weights(artifact: Artifact, report: PruneReport) -> dict[str, Tensor]:
    return {row.name: artifact.tensor(f"{row.name}.weight") for row in report.layers}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["0.5", "0.3", "2:4", "1:4", "6:8"])
def test_masks_are_exact_and_all_else_is_as_it_was(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, method: str, sparsity: str
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, method=method, sparsity=sparsity)
    report = prune(source, tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    verify_manifest(written.path)
    pattern = parse_pattern(sparsity)
    assert report.logits_max_difference == 0.0
    assert len(report.layers) == 14 and report.resumed_blocks == 0
    removed = 0
    for row, (name, weight) in zip(report.layers, weights(written, report).items(), strict=True):
        original = source.tensor(f"{name}.weight")
        assert weight.dtype == original.dtype and row.total == weight.numel()
        assert zeros(weight) == row.removed, "a random model has no zeros of its own"
        removed += row.removed
        if pattern.of is not None and pattern.kept is not None:
            groups = (weight != 0).reshape(-1, pattern.of).sum(dim=-1)
            assert (groups == pattern.kept).all()
        elif method == "wanda":
            assert ((weight == 0).sum(dim=1) == int(pattern.share * weight.shape[1])).all()
        else:
            assert row.removed == int(pattern.share * weight.numel())
        if method != "sparsegpt":
            assert torch.equal(weight[weight != 0], original[weight != 0])
            assert row.damp == 0.0
        else:
            assert row.damp == 0.01 and row.fallback is None
    for name in source.names():
        if "_proj" not in name:
            assert torch.equal(written.tensor(name), source.tensor(name))
    assert written.config == source.config
    assert report.sparsity == removed / sum(row.total for row in report.layers)
    assert report.parameters == report.original_parameters
    assert report.bytes == report.original_bytes == written.weight_bytes
    assert report.calibration_tokens == (0 if method == "magnitude" else 16 * 32)
    *unread, speed = report.warnings
    assert ("NVIDIA" in speed) == (sparsity == "2:4")
    assert [warning[:8] for warning in unread] == (["not read"] if method == "magnitude" else [])
    stream = held_out(source)
    for artifact, found in ((source, report.perplexity.dense), (written, report.perplexity.pruned)):
        assert found == math.exp(mean_nll(artifact, stream, torch.float32, CPU))
    assert report.perplexity.recovered is None and report.retraining is None
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"


def test_the_first_layers_mask_is_wandas_by_a_hook_on_transformers(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, method="wanda", sparsity="0.5")
    prune(source, tmp_path / "out", wanted)
    model = load_transformers(source, torch.float32, CPU)
    seen: list[Tensor] = []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(calibration_tokens(source, wanted.calibration, 0))
    scores = layer.weight.abs() * seen[0].flatten(0, 1).norm(dim=0)
    lowest = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
    expected = torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)
    found = read_artifact(tmp_path / "out").tensor("model.layers.0.self_attn.q_proj.weight") != 0
    assert (found != expected).float().mean() < 0.01, "but for near ties of float sums"


def test_errors_are_those_of_the_papers_order(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    found = {
        method: prune(source, tmp_path / method, settings(calibration_file, method=method))
        for method in METHODS
    }
    better = [row.error <= row.magnitude_error for row in found["sparsegpt"].layers]
    assert sum(better) >= len(better) - 1
    errors = {m: sum(row.error or 0.0 for row in r.layers) for m, r in found.items()}
    assert errors["sparsegpt"] < errors["wanda"]
    for row in found["magnitude"].layers:
        assert row.error == row.magnitude_error
        original = source.tensor(f"{row.name}.weight").float()
        kept = read_artifact(tmp_path / "magnitude").tensor(f"{row.name}.weight").float()
        # Sums of 4,096 squares in float32, in another order: a few parts in a million.
        expected = float((original - kept).norm() / original.norm()) ** 2
        assert row.error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"true_sequential": False}, {"damp_percent": 0.2}, {"seed": 1}], ids=str
)
def test_every_option_does_something(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = make_llama()
    prune(source, tmp_path / "plain", settings(calibration_file, method="sparsegpt"))
    prune(source, tmp_path / "out", settings(calibration_file, method="sparsegpt", **changes))
    plain, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("method", METHODS)
def test_owl_gives_blocks_different_shares_with_the_same_mean(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, method: str
) -> None:
    source = make_llama(num_hidden_layers=3)
    more = {"method": method, "sparsity": "0.6", "allocation": "owl", "owl_outlier": 2.0}
    wanted = settings(calibration_file, **more)
    report = prune(source, tmp_path / "out", wanted)
    assert report.allocation == "owl"
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    shares = []
    for block in range(3):
        rows = [row for row in report.layers if f".{block}." in row.name]
        shares.append(sum(r.removed for r in rows) / sum(r.total for r in rows))
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=0.02)


def test_ignored_layers_stay_as_they_are(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = make_llama()
    wanted = settings(calibration_file, ignore=("*.layers.0.*", "*.down_proj"))
    report = prune(source, tmp_path / "out", wanted)
    assert len(report.layers) == 6 and {row.name.split(".")[2] for row in report.layers} == {"1"}
    written = read_artifact(tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(written.tensor(name), source.tensor(name))


def stop_in_block(number: int) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.note.startswith(f"block {number} ") and progress.done % 7 == 3:
            raise KeyboardInterrupt

    return callback


def timeless(report: PruneReport) -> list[PrunedPart]:
    """The layers, less how long they took."""
    return [layer.model_copy(update={"seconds": 0.0}) for layer in report.layers]


@pytest.mark.parametrize(
    "changes", [{"method": m} for m in METHODS] + [{"allocation": "owl"}], ids=str
)
def test_an_interrupted_run_continues_to_the_same_bytes(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = make_llama(num_hidden_layers=3)
    wanted = settings(calibration_file, **changes)
    whole = prune(source, tmp_path / "whole", wanted)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", wanted, progress=stop_in_block(3))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResumeError):
        prune(source, tmp_path / "out", wanted)
    with pytest.raises(ResumeError, match="setting sparsity"):
        other = settings(calibration_file, **changes, sparsity="0.4")
        prune(source, tmp_path / "out", other, resume=True)
    seen: list[Progress] = []
    report = prune(source, tmp_path / "out", wanted, resume=True, progress=seen.append)
    assert report.resumed_blocks == 2
    assert {p.resumed for p in seen if p.stage == "pruning layers"} == {14}
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert timeless(report) == timeless(whole)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, value: float
) -> None:
    source, name = make_llama(), "model.layers.1.mlp.up_proj.weight"
    file = source.path / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=name):
        prune(read_artifact(source.path), tmp_path / "out", settings(calibration_file))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_what_cannot_be_done_is_refused_before_any_work(
    make_llama: MakeLlama,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="12 does not divide the 64 inputs") as caught:
        prune(make_llama(), out, settings(calibration_file, sparsity="4:12"))
    assert "ignore" not in str(caught.value.hint), "no layer fits"
    with pytest.raises(UsageError, match="32 does not divide the 80 inputs") as caught:
        odd = make_llama("odd", intermediate_size=80)
        prune(odd, out, settings(calibration_file, sparsity="16:32"))
    assert "--ignore '*.down_proj'" in str(caught.value.hint)
    quantized = make_llama("quantized")
    quantized.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedError, match="quantized"):
        prune(quantized, out, settings(calibration_file))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        prune(make_llama("alone"), out, settings(calibration_file))
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_plan_says_what_would_be_done(make_llama: MakeLlama, calibration_file: Path) -> None:
    wanted = settings(calibration_file, sparsity="2:4", method="sparsegpt", retrain=5)
    plan = plan_prune(make_llama(), wanted)
    assert plan.command == "prune" and "14 linear layers in 2 blocks" in plan.actions[0]
    assert any("retrain 5 steps" in action for action in plan.actions)
    assert plan.memory_bytes > 0 and plan.disk_bytes > 0 and plan.seconds is not None
    shape = plan_prune(make_llama("other"), settings(calibration_file, layers=1, ffn="0.5x"))
    assert "layers 1, ffn 0.5x" in shape.actions[0] and shape.seconds is None
    solved = plan_prune(make_llama("third"), settings(calibration_file, params="45k"))
    assert "1 of 2 layers, 4 of 4 heads, 64 of 128 feed-forward channels" in solved.actions[0]
    with pytest.raises(UsageError, match="layers 99: the model has 2"):
        plan_prune(make_llama("fourth"), settings(calibration_file, layers=99))


_SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {
    **_SIZES,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, eos_token_id=0),
    "phi3": lambda: Phi3Config(**_GATED),
    "mixtral": lambda: MixtralConfig(**_GATED, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(
        **_GATED, num_local_experts=4, num_experts_per_tok=2, head_dim=16
    ),
}


def model_of(family: str, make_llama: MakeLlama, tmp_path: Path) -> Artifact:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / family
    model.save_pretrained(path)
    for file in make_llama("tokenizer").path.glob("*token*"):
        shutil.copy(file, path)
    return read_artifact(path)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_kind_of_layer_keeps_its_pattern_along_its_inputs(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path, family: str, method: str
) -> None:
    source = model_of(family, make_llama, tmp_path)
    wanted = settings(calibration_file, method=method, sparsity="2:4")
    report = prune(source, tmp_path / "out", wanted)
    assert report.logits_max_difference == 0.0
    written = read_artifact(tmp_path / "out")
    assert written.names() == source.names(), "the layout is the one its loaders know"
    assert all(written.shape(name) == source.shape(name) for name in source.names())
    model = load_transformers(written, torch.float32, CPU)
    for row in report.layers:
        weight = model.get_submodule(row.name).weight
        assert isinstance(weight, Tensor)
        assert keeps_pattern(weight, parse_pattern("2:4"))
        assert 2 * zeros(weight) == weight.numel()
    assert report.sparsity == 0.5
    plain = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.float32).eval()
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_shape_that_the_architecture_cannot_have_is_refused_before_any_work(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source, out = model_of("gpt2", make_llama, tmp_path), tmp_path / "out"
    kept = tmp_path / ".out.infopt-partial" / "CURRENT"
    kept.parent.mkdir()
    kept.write_text("earlier work")
    for more in ({"heads": 2}, {"heads": 2, "hidden": 32, "iterations": 2}):
        with pytest.raises(UnsupportedError, match="cannot have this shape"):
            prune(source, out, settings(calibration_file, **more), replace=True)
    with pytest.raises(UsageError, match="knows 1024 positions"):
        long = {"retrain": 1, "retrain_length": 10**6, "retrain_tokens": 10**6}
        prune(source, out, settings(calibration_file, **long), replace=True)
    assert not out.exists() and kept.read_text() == "earlier work"


def test_what_is_chosen_by_chance_sees_no_text(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    found = {}
    for chance in ("random", "block-influence"):
        wanted = settings(calibration_file, layers=1, depth_importance=chance)
        found[chance] = prune(make_llama(chance), tmp_path / f"out-{chance}", wanted)
    assert found["random"].calibration_tokens == 0
    assert found["block-influence"].calibration_tokens == 16 * 32


def test_fused_experts_that_are_left_out_stay_as_they_were(
    make_llama: MakeLlama, calibration_file: Path, tmp_path: Path
) -> None:
    source = model_of("gpt_oss", make_llama, tmp_path)
    wanted = settings(calibration_file, ignore=("*.experts.2.*",))
    report = prune(source, tmp_path / "out", wanted)
    written = read_artifact(tmp_path / "out")
    views = [unfused(skeleton(a), a) for a in (source, written)]
    names = {f"{row.name}.weight" for row in report.layers}
    for name in views[0].names():
        before, after = (view.tensor(name) for view in views)
        assert torch.equal(before, after) == (name not in names)
        assert torch.equal(after, before.where(after != 0, 0.0)), "wanda changes no weight it keeps"
    with pytest.raises(UnsupportedError, match="experts fused"):
        prune(source, tmp_path / "no", settings(calibration_file, retrain=1))
