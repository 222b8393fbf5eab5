"""Whole units go, those that matter least, and the work resumes where it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from infopt.core.artifact.read import Artifact
from infopt.core.compression.anatomy import anatomy
from infopt.core.compression.calibration import calibration_tokens
from infopt.core.compression.checkpoint import open_checkpoint
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.files import sha256
from infopt.core.models.hf import load_transformers
from infopt.core.models.load import load_decoder
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.pruning.job import PruneJob, Staged, resolve_job
from infopt.core.pruning.measure import measure, takes_no_mean
from infopt.core.pruning.structured import make_structured
from infopt.core.pruning.target import parameter_cost, predicted_latency, target_shape, whole_shape
from infopt.core.recipe.prune import PruneSettings
from infopt.core.reports.prune import PrunedPart

Make = Callable[..., Artifact]


@pytest.fixture
def settings(calibration_file: Path) -> Callable[..., PruneSettings]:
    def build(**wanted: Any) -> PruneSettings:
        text = {"text": str(calibration_file), "samples": 6, "sequence_length": 32}
        return PruneSettings.model_validate(
            {"method": "structured", "device": "cpu", "calibration": text, **wanted}
        )

    return build


def made(
    artifact: Artifact,
    settings: PruneSettings,
    output: Path,
    *,
    resume: bool = False,
    progress: ProgressCallback = silent,
) -> tuple[Staged, dict[str, str], Tensor]:
    """What was staged, its files' digests and its logits; the folder goes when it is done."""
    job = resolve_job(artifact, settings)
    tokens = calibration_tokens(artifact, settings.calibration, settings.seed)
    with open_checkpoint(
        output, job.identity("tokens"), PrunedPart, resume=resume, replace=False
    ) as checkpoint:
        staged = make_structured(job, tokens, checkpoint, progress)
        files = {file.name: sha256(file) for file in sorted(staged.staged.path.iterdir())}
        logits = run(staged.staged)
        checkpoint.discard()
    return staged, files, logits


@torch.no_grad()
def run(artifact: Artifact) -> Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(
        artifact.path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    found: Tensor = model.eval()(input_ids=torch.arange(8)[None]).logits
    return found


def test_the_smaller_model_runs_in_transformers_and_in_our_runtime(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path
) -> None:
    artifact = make_llama(num_hidden_layers=3)
    job = resolve_job(artifact, settings(layers=2, heads=2, ffn="0.75x"))
    tokens = calibration_tokens(artifact, job.settings.calibration, 0)
    with open_checkpoint(
        tmp_path / "out", {}, PrunedPart, resume=False, replace=False
    ) as checkpoint:
        staged = make_structured(job, tokens, checkpoint, silent)
        config = staged.staged.config
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 96)
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
        expected = run(staged.staged)
        decoder = load_decoder(staged.staged, torch.float32, torch.device("cpu"))
        assert len(decoder.layers) == 2
        assert bool(torch.isfinite(expected).all())
        count = parameter_cost(artifact, parts := anatomy(artifact))
        shape = target_shape(artifact, parts, job.settings)
        assert staged.staged.summary().parameters == count.of(shape)
        assert artifact.summary().parameters == count.of(whole_shape(parts))
        checkpoint.discard()
    kinds = [row.kind for row in staged.rows]
    assert kinds == ["layers", "heads", "ffn", "heads", "ffn"]
    assert [row.removed for row in staged.rows] == [1, 1, 32, 1, 32]


def test_what_matters_least_goes(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path
) -> None:
    artifact = make_llama(num_hidden_layers=3)
    model = load_transformers(artifact, torch.bfloat16, torch.device("cpu"))
    # Block 1 does nothing; of the others, key head 0 and every fourth channel do nothing.
    for index in range(3):
        block = f"model.layers.{index}"
        silent_rows = torch.arange(0, 128, 4)
        model.get_parameter(f"{block}.mlp.up_proj.weight").data[silent_rows] = 0
        model.get_parameter(f"{block}.self_attn.v_proj.weight").data[:16] = 0
        if index == 1:
            model.get_parameter(f"{block}.mlp.down_proj.weight").data.zero_()
            model.get_parameter(f"{block}.self_attn.o_proj.weight").data.zero_()
    model.save_pretrained(artifact.path)
    expected = run(artifact)
    staged, _, logits = made(artifact, settings(layers=2, heads=2, ffn=96), tmp_path / "out")
    rows = {(row.name, row.kind): row.gone for row in staged.rows}
    assert rows["layers", "layers"] == (1,)
    for index in (0, 2):
        assert rows[f"model.layers.{index}", "heads"] == (0,)
        assert rows[f"model.layers.{index}", "ffn"] == tuple(range(0, 128, 4))
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_empty_hidden_channels_go_and_the_norms_make_up_for_them(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path
) -> None:
    artifact = make_llama()
    model = load_transformers(artifact, torch.bfloat16, torch.device("cpu"))
    empty = torch.arange(3, 64, 4)
    model.get_parameter("model.embed_tokens.weight").data[:, empty] = 0
    for index in range(2):
        for layer in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.{index}.{layer}.weight").data[empty] = 0
    model.save_pretrained(artifact.path)
    expected = run(artifact)
    staged, _, logits = made(artifact, settings(hidden="0.75x"), tmp_path / "out")
    assert [row.gone for row in staged.rows] == [tuple(empty.tolist())]
    assert staged.staged.config["hidden_size"] == 48
    assert staged.staged.config["head_dim"] == 16
    # The gain is rounded to bfloat16.
    torch.testing.assert_close(logits, expected, atol=0.01, rtol=0.05)


@pytest.mark.parametrize("stop", [("measuring importance", 1), ("cutting", 1)])
def test_an_interrupted_work_resumes_to_the_same_bytes(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path, stop: tuple[str, int]
) -> None:
    artifact = make_llama(num_hidden_layers=4)
    wanted = settings(layers=2, ffn="0.5x", iterations=2)
    _, expected, _ = made(artifact, wanted, tmp_path / "whole")
    seen: list[Progress] = []

    def interrupt(at: Progress) -> None:
        seen.append(at)
        if (at.stage, at.done) == stop and len([s for s in seen if s.stage == stop[0]]) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(artifact, wanted, tmp_path / "out", progress=interrupt)
    _, files, _ = made(artifact, wanted, tmp_path / "out", resume=True)
    assert files == expected


def test_rounds_count_in_the_originals_numbers(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path
) -> None:
    artifact = make_llama(num_hidden_layers=4)
    wanted = settings(layers=2, ffn=64, iterations=2, importance="random", seed=3)
    staged, _, logits = made(artifact, wanted, tmp_path / "out")
    layers = staged.rows[0]
    assert layers.removed == 2
    assert bool(torch.isfinite(logits).all())
    left = [i for i in range(4) if i not in layers.gone]
    assert [row.name for row in staged.rows[1:]] == [f"model.layers.{i}" for i in left]
    assert all(row.removed == 64 and len(row.gone) == 64 for row in staged.rows[1:])


def test_importances_choose_differently(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path
) -> None:
    artifact = make_llama()
    gone = {}
    for importance in ("minitron", "magnitude", "random"):
        wanted = settings(ffn="0.5x", importance=importance)
        staged, _, _ = made(artifact, wanted, tmp_path / importance)
        gone[importance] = staged.rows[0].gone
    assert len(set(gone.values())) == 3


def test_scores_of_the_walk_are_those_of_the_whole_model(
    make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path
) -> None:
    artifact = make_llama()
    job: PruneJob = resolve_job(artifact, settings(layers=1, dtype="float32"))
    tokens = calibration_tokens(artifact, job.settings.calibration, 0)
    with open_checkpoint(tmp_path / "o", {}, PrunedPart, resume=False, replace=False) as checkpoint:
        found = measure(job, artifact, anatomy(artifact), tokens, "r", checkpoint, silent)
        checkpoint.discard()
    model = load_transformers(artifact, torch.float32, torch.device("cpu"))
    seen: dict[str, Tensor] = {}
    for name in ("model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    norms = [n for n, m in model.named_modules() if "norm" in n]
    for name in norms:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(name, output)
        )
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1)
    torch.testing.assert_close(found.influence[0], 1 - cosine.mean(), atol=1e-4, rtol=1e-4)
    channels = seen["model.layers.1.mlp.down_proj"].abs().mean(1).norm(dim=0)
    torch.testing.assert_close(found.ffn[1], channels, atol=1e-4, rtol=1e-4)
    outputs = seen["model.layers.1.self_attn.o_proj"].reshape(6, 32, 2, 2, 16)
    heads = outputs.norm(dim=-1).mean(1).sum(-1).norm(dim=0)
    torch.testing.assert_close(found.heads[1], heads, atol=1e-4, rtol=1e-4)
    hidden = torch.stack([seen[name].abs().mean(1).norm(dim=0) for name in norms]).sum(0)
    torch.testing.assert_close(found.hidden, hidden, atol=1e-3, rtol=1e-3)
    assert set(found.norms) == set(norms)


def test_budgets(make_llama: Make, settings: Callable[..., PruneSettings], tmp_path: Path) -> None:
    artifact = make_llama(num_hidden_layers=6)
    parts = anatomy(artifact)
    params = artifact.summary().parameters
    wanted = settings(params=int(params * 0.7))
    staged, _, _ = made(artifact, wanted, tmp_path / "out")
    assert params * 0.5 < staged.staged.summary().parameters <= params * 0.7
    shape = target_shape(artifact, parts, settings(latency="0.6x"))
    assert 0.4 < predicted_latency(artifact, parts, shape) <= 0.6
    assert "predicted" in staged.warnings[0]
    # What is read of an embedding that is no head is a row.
    untied = make_llama("untied", num_hidden_layers=6, tie_word_embeddings=False)
    cut = target_shape(untied, anatomy(untied), settings(layers=3))
    expected = (
        256 * 64 + 64 + 3 * (cut_block := 64 * 64 * 2 + 2 * 32 * 64 + 3 * 128 * 64 + 128)
    ) / (256 * 64 + 64 + 6 * cut_block)
    assert predicted_latency(untied, anatomy(untied), cut) == pytest.approx(expected)


def test_sizes_that_do_not_fit_are_refused(
    make_llama: Make, settings: Callable[..., PruneSettings]
) -> None:
    artifact = make_llama()
    parts = anatomy(artifact)
    for wanted, message in (
        ({"layers": 3}, "layers 3: the model has 2"),
        ({"layers": 2}, "nothing would be removed"),
        ({"heads": 3}, "4 query heads share 2 key heads"),
        ({"heads": 6}, "heads 6"),
        ({"ffn": 256}, "ffn 256: the model has 128"),
        ({"params": "1k"}, "not reachable"),
        ({"latency": "0.01x"}, r"0.01x is not reachable: .* reaches from 0\.\d+ to less than 1 "),
    ):
        with pytest.raises(UsageError, match=message):
            target_shape(artifact, parts, settings(**wanted))
    one = make_llama("mqa", num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="share one key head"):
        target_shape(one, anatomy(one), settings(heads=2))


def test_norms_that_take_the_mean_away_are_told() -> None:
    assert takes_no_mean(torch.nn.RMSNorm(16))
    assert not takes_no_mean(torch.nn.LayerNorm(16))
