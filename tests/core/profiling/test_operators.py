"""The clocks change nothing of what is computed, and miss nothing of what it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.profiling.operators import Clock, operator_bytes, timed
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.phases import PhaseRunner

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "gated": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "plain": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "experts": MixtralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, num_local_experts=4
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clocked") / request.param
    AutoModelForCausalLM.from_config(MODELS[request.param]).save_pretrained(folder)
    return read_artifact(folder)


def test_clocks_at_every_operator(artifact: Artifact) -> None:
    runner = PhaseRunner(artifact, EngineSettings(device="cpu", dtype="float32"))
    clock = Clock()
    seen: list[torch.Tensor] = []

    def wrap(decoder: Any) -> Any:
        clocked = timed(decoder, clock)
        return replace(clocked, head=Watched(clocked.head, seen))

    runner.instrument(wrap)
    runner.prefill(2, 12)
    split = clock.split()
    inner = "experts" if artifact.path.name == "experts" else "gate_up"
    assert {"embedding", "norms", "qkv", "attention", "o", inner, "lm_head"} <= set(split)
    assert all(seconds > 0 for seconds in split.values())
    assert sorted(clock.layers) == [0, 1]
    assert sum(clock.layers.values()) < sum(split.values())
    runner.instrument(None)
    again = PhaseRunner(artifact, EngineSettings(device="cpu", dtype="float32"))
    again.instrument(lambda decoder: replace(decoder, head=Watched(decoder.head, seen)))
    again.prefill(2, 12)
    assert torch.equal(seen[0], seen[1])


class Watched:
    """A head that keeps what it said."""

    def __init__(self, head: Any, seen: list[torch.Tensor]) -> None:
        self.head, self.seen = head, seen

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(found := self.head(x))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


def test_bytes_by_operator_are_what_a_token_reads(artifact: Artifact) -> None:
    runner = PhaseRunner(artifact, EngineSettings(device="cpu", dtype="float32"))
    found: dict[str, int] = {}
    runner.instrument(lambda decoder: found.update(operator_bytes(decoder)) or decoder)
    norms = runner.weight_bytes - sum(found.values())
    assert 0 < norms < 0.05 * runner.weight_bytes


def test_the_prefill_of_a_page(artifact: Artifact, tmp_path: Path) -> None:
    """From a measured profile to its page, figures and all."""
    from infopt.core.profiling.profile import profile
    from infopt.core.recipe.profile import ProfileSettings
    from infopt.core.reports.html import to_html
    from infopt.core.reports.profile import Peaks

    peaks = Peaks(
        device="a chip", dtype="float32", threads=1, flops_per_s=1e12, bytes_per_s=1e11,
        measured_at="2026-01-01T00:00:00+00:00", conditions={},
    )  # fmt: skip
    settings = ProfileSettings.model_validate(
        {
            "mfu": True, "mbu": True, "memory": True, "trace": str(tmp_path / "trace.json"),
            "prompt_tokens": 16, "output_tokens": 4, "repeats": 2, "device": "cpu",
            "dtype": "float32",
        }
    )  # fmt: skip
    runner = PhaseRunner(artifact, EngineSettings(device="cpu", dtype="float32"))
    report = profile(artifact, settings, runner, peaks=peaks)
    assert report.prefill is not None and report.decode is not None
    for phase in (report.prefill, report.decode):
        assert sum(one.share for one in phase.operators) == pytest.approx(1.0)
        assert len(phase.layer_seconds) == 2
        costed = {one.name: one.flops for one in phase.operators}
        assert costed["qkv"] > 0 and costed["attention"] > 0
    assert report.memory is not None and report.memory.peak_bytes >= report.memory.before_bytes / 2
    assert (tmp_path / "trace.json").read_text().count('"decode step"') >= 4
    page = to_html(report)
    for words in ("Does it fit?", "Roofline", "Memory over time", "With a clock at each operator"):
        assert words in page
    assert page.count("<figure>") == 2
