"""Layers of different widths: the allocation kept, the bound held, interrupted work continued."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infopt.core.artifact.quantized import linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression import quality
from infopt.core.errors import GateError, ResumeError
from infopt.core.formats.number import QuantizedWeight
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress
from infopt.core.quantization import mixed
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.reports.quantize import QuantizeReport
from infopt.core.text.sources import evaluation_text
from infopt.core.text.windows import token_stream

CPU = torch.device("cpu")
Stop = Callable[[Progress], bool]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny Llama that knows a text so well that fewer bits cost perplexity on it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=alphabet[0])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    stream = token_stream(evaluation_text("default"), tokenizer, chat=False, limit=1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        begins = torch.randint(len(stream) - 65, (8,)).tolist()
        tokens = torch.stack([stream[begin : begin + 64] for begin in begins])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return read_artifact(folder)


def judge_by_what_was_learned(patch: pytest.MonkeyPatch) -> None:
    """The windows that the model was trained on, where rounding does harm for certain."""
    patch.setattr(quality, "TOKENS", 1024)
    patch.setattr(quality, "_CONTEXT", 64)


@pytest.fixture(autouse=True)
def _judge_by_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_by_what_was_learned(monkeypatch)


def settings(calibration_file: Path, **changes: Any) -> QuantizeSettings:
    calibration = {"text": str(calibration_file), "samples": 16, "sequence_length": 32}
    values = {"calibration": calibration, "dtype": "float32", "device": "cpu", "group_size": 32}
    return QuantizeSettings.model_validate(values | changes)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def stored_bits(artifact: Artifact, layer: str) -> int:
    weight = linear_weight(artifact, layer)
    assert isinstance(weight, QuantizedWeight)
    return weight.format.bits


WIDTHS: list[dict[str, Any]] = [
    {"method": "rtn", "target_bits": 3.5},
    {"method": "gptq", "target_bits": 2.6, "mixed_bits": (2, 3, 4)},
    {"method": "gptq", "target_bits": 5.0, "mixed_bits": (4, 8), "format": "compressed-tensors"},
    {"method": "awq", "target_bits": 3.5},
    {"method": "rotate", "target_bits": 6.0, "mixed_bits": (4, 8), "format": "compressed-tensors"},
    {"method": "qat", "target_bits": 3.0, "mixed_bits": (2, 4), "steps": 2},
]


@pytest.mark.parametrize("case", WIDTHS, ids=lambda c: f"{c['method']}-{c['target_bits']}")
def test_what_is_stored_is_what_was_allocated(
    trained: Artifact, calibration_file: Path, tmp_path: Path, case: dict[str, Any]
) -> None:
    report = quantize(trained, tmp_path / "out", settings(calibration_file, **case))
    written = read_artifact(tmp_path / "out")
    allocation = report.allocation
    assert allocation is not None and report.bits is None and report.scheme == "mixed"
    assert allocation.target_bits == case["target_bits"] and allocation.rounds == 1
    assert allocation.mean_bits <= case["target_bits"] + 1e-9
    assert len(allocation.bits) == 8 and len(set(allocation.bits.values())) > 1
    assert set(allocation.bits.values()) <= set(case.get("mixed_bits", (3, 4, 8)))
    assert allocation.predicted_kl >= 0 and allocation.measured_ppl_increase is None
    rows = {row.name: row.bits for row in report.layers}
    assert len(rows) == 14
    for name, bits in rows.items():
        assert stored_bits(written, name) == bits, name
        assert bits == allocation.bits[unit_of(name)]
    sizes = {name: trained.shape(f"{name}.weight") for name in rows}
    total = sum(a * b for a, b in sizes.values())
    mean = sum(rows[name] * a * b for name, (a, b) in sizes.items()) / total
    assert mean == pytest.approx(allocation.mean_bits)
    assert report.bits_per_weight > mean, "scales come with them"
    assert report.logits_max_difference <= 1e-4
    found = load_transformers(written, torch.float32, CPU)
    assert bool(torch.isfinite(found(torch.arange(3, 40)[None]).logits).all())


def unit_of(layer: str) -> str:
    """The name of the layers that an engine fuses with this one."""
    parent, _, leaf = layer.rpartition(".")
    match leaf:
        case "q_proj" | "k_proj" | "v_proj":
            return f"{parent}.{{q,k,v}}_proj"
        case "gate_proj" | "up_proj":
            return f"{parent}.{{gate,up}}_proj"
    return layer


def test_the_gptq_table_says_each_layers_width(
    trained: Artifact, calibration_file: Path, tmp_path: Path
) -> None:
    wanted = settings(calibration_file, target_bits=3.0, mixed_bits=(2, 3, 4, 8))
    report = quantize(trained, tmp_path / "out", wanted)
    table = read_artifact(tmp_path / "out").config["quantization_config"]
    assert table["quant_method"] == "gptq"
    widths = {row.name: row.bits for row in report.layers}
    others = {name: bits for name, bits in widths.items() if bits != table["bits"]}
    assert others and len(table["dynamic"]) == len(others)
    for name, bits in others.items():
        pattern = "+:^" + name.replace(".", "\\.") + "$"
        assert table["dynamic"][pattern]["bits"] == bits


def test_more_bits_predict_less_harm(
    trained: Artifact, calibration_file: Path, tmp_path: Path
) -> None:
    found = []
    for target in (2.5, 3.5, 5.0):
        case = settings(calibration_file, method="rtn", target_bits=target, mixed_bits=(2, 3, 4, 8))
        allocation = quantize(trained, tmp_path / str(target), case).allocation
        assert allocation is not None
        found.append((allocation.mean_bits, allocation.predicted_kl))
    assert found == sorted(found, key=lambda pair: pair[0])
    kl = [pair[1] for pair in found]
    assert kl == sorted(kl, reverse=True) and kl[0] > kl[-1]


def increase(original: Artifact, written: Artifact) -> float:
    """Of perplexity, on the text that the bound is on."""
    stream = quality.held_out(original)
    nll, base = (quality.mean_nll(a, stream, torch.float32, CPU) for a in (written, original))
    return math.expm1(nll - base)


@pytest.mark.parametrize("share", ["5%", "0.3%"])
def test_a_bound_on_perplexity_is_kept(
    trained: Artifact, calibration_file: Path, tmp_path: Path, share: str
) -> None:
    wanted = settings(
        calibration_file, method="rtn", max_ppl_increase=share, mixed_bits=(2, 3, 4, 8)
    )
    report = quantize(trained, tmp_path / "out", wanted)
    allocation = report.allocation
    assert allocation is not None and allocation.measured_ppl_increase is not None
    assert allocation.max_ppl_increase == wanted.max_ppl_increase
    measured = increase(trained, read_artifact(tmp_path / "out"))
    assert measured == pytest.approx(allocation.measured_ppl_increase, abs=1e-6)
    assert measured <= float(share[:-1]) / 100
    assert {row.bits for row in report.layers} == set(allocation.bits.values())
    assert 1 <= allocation.rounds <= 4
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("share", [0.0001, 0.0])
def test_a_bound_that_none_keeps_is_told_with_what_was_measured(
    trained: Artifact, calibration_file: Path, tmp_path: Path, share: float
) -> None:
    wanted = settings(calibration_file, method="rtn", max_ppl_increase=share, mixed_bits=(2, 3))
    with pytest.raises(GateError, match=rf"within \+{share:.2%}.*\+\d+\.\d\d%") as caught:
        quantize(trained, tmp_path / "out", wanted)
    assert caught.value.exit_code == 1 and "mixed_bits" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*")), "it would come again: there is nothing to continue"


def test_nothing_is_tried_twice(trained: Artifact, calibration_file: Path, tmp_path: Path) -> None:
    """Where the fewest bits keep the bound, there is nothing left to search."""
    seen: list[Progress] = []
    wanted = settings(calibration_file, method="rtn", max_ppl_increase=3.0)
    report = quantize(trained, tmp_path / "out", wanted, progress=seen.append)
    assert report.allocation is not None and report.allocation.mean_bits == 3.0
    assert report.allocation.rounds == 1
    assert sum(p.stage == "measuring perplexity" for p in seen) == 1


def in_sensitivity(p: Progress) -> bool:
    return p.stage == "measuring sensitivity" and p.done == 20


def in_block_two(p: Progress) -> bool:
    return p.note == "block 2 of 2" and p.done == 10


def before_the_first_block(p: Progress) -> bool:
    return p.stage == "quantizing layers"


def at_the_writing(p: Progress) -> bool:
    return p.stage == "writing"


def measuring_round_one(p: Progress) -> bool:
    return p.stage == "measuring perplexity"


def stop(when: Stop, after: Stop | None = None) -> Callable[[Progress], None]:
    """Interrupt at the first progress that is so, once there was one `after` which to look."""
    looking = after is None

    def callback(progress: Progress) -> None:
        nonlocal looking
        if looking and when(progress):
            raise KeyboardInterrupt
        looking = looking or (after is not None and after(progress))

    return callback


def same_but_for_time(one: QuantizeReport, other: QuantizeReport) -> bool:
    def timeless(report: QuantizeReport) -> dict[str, Any]:
        rows = tuple(row.model_copy(update={"seconds": 0.0}) for row in report.layers)
        free = {"seconds": 0.0, "peak_memory_bytes": 0, "resumed_blocks": 0, "output": ""}
        return report.model_copy(update={**free, "layers": rows}).model_dump()

    return timeless(one) == timeless(other)


STOPS: dict[str, Callable[[], Callable[[Progress], None]]] = {
    "in sensitivity": lambda: stop(in_sensitivity),
    "before the first block": lambda: stop(before_the_first_block),
    "in the second block": lambda: stop(in_block_two),
    "at the writing": lambda: stop(at_the_writing),
}


@pytest.mark.parametrize("where", STOPS)
def test_an_interrupted_allocation_continues_to_the_same_bytes(
    trained: Artifact, calibration_file: Path, tmp_path: Path, where: str
) -> None:
    wanted = settings(calibration_file, target_bits=3.0, mixed_bits=(2, 3, 4, 8))
    whole = quantize(trained, tmp_path / "whole", wanted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(trained, out, wanted, progress=STOPS[where]())
    assert not out.exists()
    with pytest.raises(ResumeError, match="unfinished"):
        quantize(trained, out, wanted)
    seen: list[Progress] = []
    report = quantize(trained, out, wanted, resume=True, progress=seen.append)
    measured = {p.resumed for p in seen if p.stage == "measuring sensitivity"}
    assert measured == ({16} if where == "in sensitivity" else set()), "kept every 16 rows"
    assert report.resumed_blocks == {"in the second block": 1, "at the writing": 2}.get(where, 0)
    assert content(out) == content(tmp_path / "whole")
    assert same_but_for_time(report, whole)
    assert not list(tmp_path.glob(".out*"))


ROUNDS: dict[str, Callable[[], Callable[[Progress], None]]] = {
    "in sensitivity": lambda: stop(in_sensitivity),
    "in round 1": lambda: stop(in_block_two),
    "before round 1 is judged": lambda: stop(measuring_round_one),
    "between the rounds": lambda: stop(lambda _: True, measuring_round_one),
    "in round 2": lambda: stop(in_block_two, measuring_round_one),
}


@pytest.fixture(scope="module")
def searched(
    trained: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizeSettings, Path, QuantizeReport]:
    """A search of several rounds that nothing interrupted."""
    folder = tmp_path_factory.mktemp("searched")
    text = folder / "calibration.txt"
    text.write_text(" ".join(f"word{i % 97} is number {i * i % 1009}." for i in range(2000)))
    wanted = settings(text, method="rtn", max_ppl_increase="1%", mixed_bits=(2, 3, 4, 8))
    with pytest.MonkeyPatch.context() as patch:
        judge_by_what_was_learned(patch)
        report = quantize(trained, folder / "whole", wanted)
    assert report.allocation is not None and report.allocation.rounds > 1
    return wanted, folder / "whole", report


@pytest.mark.parametrize("where", ROUNDS)
def test_an_interrupted_search_continues_to_the_same_bytes(
    trained: Artifact,
    searched: tuple[QuantizeSettings, Path, QuantizeReport],
    tmp_path: Path,
    where: str,
) -> None:
    wanted, whole, expected = searched
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(trained, out, wanted, progress=ROUNDS[where]())
    assert not out.exists()
    seen: list[Progress] = []
    report = quantize(trained, out, wanted, resume=True, progress=seen.append)
    assert content(out) == content(whole)
    assert report.allocation == expected.allocation
    assert same_but_for_time(report, expected)
    assert expected.allocation is not None
    judged = [p.note for p in seen if p.stage == "measuring perplexity"]
    done = 1 if where in ("between the rounds", "in round 2") else 0
    assert len(judged) == expected.allocation.rounds - done, "a finished round is not repeated"
    assert not list(tmp_path.glob(".out*"))


def test_a_search_that_trains_each_round_anew(
    trained: Artifact,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The codes that training begins at are those of the round's own widths."""
    tried: list[dict[str, int]] = []
    with_bits = mixed._with_bits

    def spy(job: Any, rows: Any, bits: dict[str, int]) -> Any:
        tried.append(bits)
        return with_bits(job, rows, bits)

    monkeypatch.setattr(mixed, "_with_bits", spy)
    bound = 0.01
    for attempt in range(5):  # which bound the first round misses depends on the CPU
        out = tmp_path / str(attempt)
        wanted = settings(
            calibration_file,
            method="qat",
            steps=2,
            max_ppl_increase=bound,
            mixed_bits=(2, 4, 8),
        )
        tried.clear()
        report = quantize(trained, out, wanted)
        assert report.allocation is not None
        if any(bits != tried[0] for bits in tried):
            break
        assert report.allocation.measured_ppl_increase is not None
        bound = 0.98 * report.allocation.measured_ppl_increase
    else:
        pytest.fail("one allocation proves nothing")
    assert increase(trained, read_artifact(out)) <= bound
    rows = {row.name: row.bits for row in report.layers}
    assert all(bits == report.allocation.bits[unit_of(name)] for name, bits in rows.items())


def test_a_bound_of_nothing_is_a_bound(
    trained: Artifact, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding costs nothing at all, perplexity has risen by no more than nothing."""
    monkeypatch.setattr(mixed, "mean_nll", lambda *_: 1.0)
    wanted = settings(calibration_file, method="rtn", max_ppl_increase=0.0)
    report = quantize(trained, tmp_path / "out", wanted)
    assert report.allocation is not None and report.allocation.measured_ppl_increase == 0.0
