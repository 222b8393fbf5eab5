"""The door against transformers' own loss, its refusals and its gate."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.errors import GateError, NumericsError, UsageError
from infopt.core.evaluation.evaluate import check_gate, evaluate
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.reports.evaluate import EvaluateReport


def settings(text: str, **others: object) -> EvaluateSettings:
    values = {"text": text, "context": 64, "tokens": None, "dtype": "float32", "device": "cpu"}
    return EvaluateSettings.model_validate(values | others)


def reference_nll(artifact: Artifact, text: str, context: int, stride: int) -> float:
    """Straight from the loss of transformers, one window at a time."""
    model = LlamaForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    ids = torch.tensor(artifact.tokenizer()(Path(text).read_text())["input_ids"])
    total, done, start = 0.0, 0, 0
    while done < len(ids) - 1:
        window = ids[start : start + context + 1]
        labels = window.clone()
        labels[: done + 1 - start] = -100
        scored = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(window[None], labels=labels[None]).loss) * scored
        done, start = done + scored, start + stride
    return total / done


@pytest.mark.parametrize("stride", [None, 64, 17, 5])
def test_perplexity_is_the_loss_of_transformers(make_artifact, text_file: str, stride) -> None:
    artifact = make_artifact("model")
    report = evaluate(artifact, settings(text_file, stride=stride))
    assert report.tokens == 499
    assert report.nll == pytest.approx(
        reference_nll(artifact, text_file, 64, stride or 64), rel=1e-5
    )
    assert report.perplexity == pytest.approx(math.exp(report.nll))
    # One byte a token: as many characters as scored tokens.
    assert report.characters == 499
    assert report.bits_per_character == pytest.approx(report.nll / math.log(2))
    assert report.stride == (stride or 64)
    assert report.tokens_per_s > 0
    assert report.baseline is report.kl_divergence is report.delta_nll is None


def test_inputs_and_caches_that_are_quantized_are_scored_so(make_artifact, text_file: str) -> None:
    """int8 codes stand for just the baseline's weights; all that differs is rounded at run time."""
    one, other = make_artifact("one"), make_artifact("other")
    tensors = load_file(one.path / "model.safetensors")
    codes = {n: (t * 16).round().clamp(-128, 127) for n, t in tensors.items() if "_proj" in n}
    dense = {**tensors, **{name: code / 16 for name, code in codes.items()}}
    save_file(dense, other.path / "model.safetensors", metadata={"format": "pt"})
    eighth = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {"strategy": "tensor", "dynamic": False, **eighth}
    weights, inputs = {"strategy": "channel", **eighth}, {"dynamic": True, **eighth}
    int8 = {name: code.to(torch.int8) for name, code in codes.items()}
    int8 |= {f"{n}_scale": torch.full((len(code), 1), 1 / 16) for n, code in codes.items()}
    caches = {
        f"model.layers.{n}.self_attn.{kind}": torch.full((1,), 0.1)
        for n in range(2)
        for kind in ("k_scale", "v_scale")
    }
    found: dict[str, float | None] = {}
    for case, rounded, cached in (
        ("none", None, None),
        ("w8a8", inputs, None),
        ("kv", None, scheme),
    ):
        stored = {**tensors, **int8, **(caches if cached else {})}
        save_file(stored, one.path / "model.safetensors", metadata={"format": "pt"})
        group = {"targets": ["Linear"], "weights": weights, "input_activations": rounded}
        table = {"quant_method": "compressed-tensors", "format": "int-quantized"}
        groups = {"config_groups": {"group_0": group}, "kv_cache_scheme": cached}
        artifact = read_artifact(one.path)
        artifact.config["quantization_config"] = {**table, **groups}
        found[case] = evaluate(
            artifact, settings(text_file), read_artifact(other.path)
        ).kl_divergence
    assert found["none"] == pytest.approx(0, abs=1e-6)
    assert found["w8a8"] > 1e-4 and found["kv"] > 1e-4


def test_a_model_is_its_own_equal(make_artifact, text_file: str) -> None:
    one, same = make_artifact("one"), make_artifact("same")
    for other in (one, same):
        report = evaluate(one, settings(text_file, max_ppl_increase=0), other)
        assert report.kl_divergence == 0
        assert report.top1_agreement == 1
        assert report.delta_nll == 0
        assert report.baseline is not None and report.baseline.perplexity == report.perplexity
        check_gate(report, settings(text_file, max_ppl_increase=0))


def test_a_different_baseline(make_artifact, text_file: str) -> None:
    one, two = make_artifact("one"), make_artifact("two", seed=1)
    report = evaluate(one, settings(text_file), two)
    alone = evaluate(two, settings(text_file))
    assert report.baseline is not None
    assert report.baseline.nll == pytest.approx(alone.nll, rel=1e-12)
    assert report.delta_nll == pytest.approx(report.nll - alone.nll)
    assert report.kl_divergence is not None and report.kl_divergence > 0.1
    assert report.top1_agreement is not None and report.top1_agreement < 0.5


def test_it_repeats_itself(make_artifact, text_file: str) -> None:
    artifact, baseline = make_artifact("one"), make_artifact("two", seed=1)
    first, second = (evaluate(artifact, settings(text_file), baseline) for _ in range(2))
    timed = {"tokens_per_s"}
    assert first.model_dump(exclude=timed) == second.model_dump(exclude=timed)


def test_every_number_says_where_it_comes_from(make_artifact, text_file: str) -> None:
    artifact = make_artifact("model")
    report = evaluate(artifact, settings(text_file), artifact)
    for key, value in report.model_dump().items():
        if isinstance(value, int | float) and key != "schema_version":
            assert report.provenance[key] in ("measured", "computed"), key
    assert "baseline" in report.provenance


def test_weights_that_are_not_finite_name_the_window(make_artifact, text_file: str) -> None:
    artifact = make_artifact("model")
    file = artifact.path / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model's logits in window 1 of 8 \(tokens 0 to 64\)"):
        evaluate(artifact, settings(text_file))
    with pytest.raises(NumericsError, match="baseline's logits in window 1"):
        evaluate(make_artifact("sane"), settings(text_file), artifact)


def test_a_short_text_is_refused(make_artifact, text_file: str) -> None:
    with pytest.raises(UsageError, match="100 tokens: too few for a window of 128"):
        evaluate(make_artifact("model"), settings(text_file, context=128, tokens=100))


def test_a_baseline_must_read_the_same_tokens(make_artifact, text_file: str) -> None:
    one = make_artifact("one")
    with pytest.raises(UsageError, match="split the text differently"):
        evaluate(one, settings(text_file), make_artifact("two", shift=1))
    with pytest.raises(UsageError, match="has 300 tokens in its vocabulary, the model 256"):
        evaluate(one, settings(text_file), make_artifact("three", vocabulary=300))


def report_with(perplexity: float, baseline: float) -> EvaluateReport:
    quality = {"perplexity": perplexity, "nll": 1.0, "bits_per_character": 1.0}
    counts = dict.fromkeys(("windows", "context", "stride", "tokens", "characters"), 4)
    words = dict.fromkeys(("text", "text_sha256", "protocol", "dtype"), "")
    values = quality | counts | words | {"provenance": {}, "tokens_per_s": 1.0, "memory_bytes": 1}
    model = {"name": "b", "path": "b", "architecture": "b", "parameters": 1, "bytes": 1}
    return EvaluateReport.model_validate(
        values | {"baseline": {"model": model, "perplexity": baseline, "nll": 1.0}}
    )


def test_the_gate() -> None:
    bound = EvaluateSettings(max_ppl_increase=0.02)
    check_gate(report_with(10.19, 10), bound)
    check_gate(report_with(9, 10), bound)
    check_gate(report_with(100, 10), EvaluateSettings())
    with pytest.raises(GateError, match=r"10\.2100 is \+2\.10% off the baseline's 10\.0000"):
        check_gate(report_with(10.21, 10), bound)
    with pytest.raises(GateError):
        check_gate(report_with(math.inf, 10), bound)
