"""Time GPTQ (4 bits, groups of 64) of the default model beside gptqmodel and llm-compressor.

    python docs/results/gptq_peers.py --output peers.jsonl --llmcompressor PYTHON [--rounds 3]

Each run is a process of its own and quantizes with the same calibration tokens; the tools take
turns. `seconds` is of quantizing and saving, without imports and without reading the model;
`wall` is of the whole process; `peak` its largest resident memory. --llmcompressor names the
Python of an environment that has llm-compressor (it pins its own transformers).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TOOLS = ("infopt", "gptqmodel", "llmcompressor")


def peers_dtype() -> Any:
    """What infopt's `auto` computes in: a CPU without bfloat16 instructions emulates it, and a peer
    left to the checkpoint's dtype took over ten times as long there."""
    import torch

    return getattr(torch, os.environ["PEERS_DTYPE"])


def run_infopt(model: str, tokens: Any, output: str) -> float:
    from infopt.core.artifact.read import read_artifact
    from infopt.core.libraries import share_cores
    from infopt.core.quantization import quantize as room
    from infopt.core.recipe.quantize import QuantizeSettings

    share_cores()
    artifact = read_artifact(Path(model))
    calibration = {"samples": tokens.shape[0], "sequence_length": tokens.shape[1]}
    settings = QuantizeSettings.model_validate({"group_size": 64, "calibration": calibration})
    room.calibration_tokens = lambda *_: tokens  # type: ignore[assignment]
    started = time.perf_counter()
    room.quantize(artifact, Path(output), settings)
    return time.perf_counter() - started


def run_gptqmodel(model: str, tokens: Any, output: str) -> float:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=64)
    loaded = GPTQModel.load(model, config, device="cpu", dtype=peers_dtype())
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    started = time.perf_counter()
    loaded.quantize(data, batch_size=8)
    loaded.save(output)
    assert torch.__version__
    return time.perf_counter() - started


def run_llmcompressor(model: str, tokens: Any, output: str) -> float:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=peers_dtype())
    rows = tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    weights = QuantizationArgs(num_bits=4, group_size=64, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    started = time.perf_counter()
    oneshot(
        model=loaded,
        dataset=data,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows),
        batch_size=8,
        output_dir=output,
    )
    return time.perf_counter() - started


def child(tool: str, model: str, tokens: str, output: str) -> None:
    import resource

    from safetensors.torch import load_file

    run = {
        "infopt": run_infopt,
        "gptqmodel": run_gptqmodel,
        "llmcompressor": run_llmcompressor,
    }[tool]
    seconds = run(model, load_file(tokens)["tokens"], output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write("\nRESULT " + json.dumps({"seconds": seconds, "peak": peak}) + "\n")


def one_run(tool: str, python: str, model: str, tokens: Path, output: Path) -> dict[str, Any]:
    from infopt.core.hardware.choose import choose_dtype

    environment = {
        **os.environ,
        "PEERS_DTYPE": choose_dtype("auto", "cpu"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GPTQMODEL_CPU_WORKERS": "2",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, str(Path(__file__).resolve()), "--child", tool, model, tokens, output]
    started = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tokens.parent,  # where tools may leave their logs
    )
    wall = time.perf_counter() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{tool}: {done.stderr[-2000:]}")
    return {"tool": tool, "wall": wall, **json.loads(lines[-1].removeprefix("RESULT "))}


def quality(output: Path, model: str) -> dict[str, Any]:
    words = ["evaluate", output, "--baseline", model, "--tokens", "8192", "--dtype", "float32"]
    infopt = Path(sys.executable).parent / "infopt"
    told = subprocess.run(
        [str(infopt), *map(str, words), "--quiet", "--json", "-"], capture_output=True, text=True
    )
    found = json.loads(told.stdout)
    return {key: found[key] for key in ("delta_nll", "kl_divergence", "top1_agreement")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    from safetensors.torch import save_file

    from infopt.core.artifact.locate import locate
    from infopt.core.compression.calibration import calibration_tokens
    from infopt.core.recipe.text import CalibrationSettings

    artifact = locate(None)
    pythons = {"infopt": sys.executable, "gptqmodel": sys.executable}
    if given.llmcompressor:
        pythons["llmcompressor"] = given.llmcompressor
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        text = CalibrationSettings(samples=given.samples, sequence_length=512)
        tokens = Path(scratch) / "tokens.safetensors"
        save_file({"tokens": calibration_tokens(artifact, text, 0)}, tokens)
        for number in range(given.rounds):
            for tool, python in pythons.items():
                place = Path(scratch) / f"{tool}-{number}"
                row = one_run(tool, python, str(artifact.path), tokens, place)
                if number == 0:
                    row |= quality(place, str(artifact.path))
                rows.append(row)
                with given.output.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
    for tool in pythons:
        mine = [row for row in rows if row["tool"] == tool]
        sys.stdout.write(
            f"{tool}: {median(r['seconds'] for r in mine):.1f} s, wall "
            f"{median(r['wall'] for r in mine):.1f} s, peak "
            f"{max(r['peak'] for r in mine) / 1e9:.2f} GB, "
            f"delta NLL {mine[0]['delta_nll']:.4f}, KL {mine[0]['kl_divergence']:.4f}\n"
        )


if __name__ == "__main__":
    main()
