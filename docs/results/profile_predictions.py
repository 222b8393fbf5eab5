"""Predicted times beside measured ones: decode and prefill of the default model, in three formats.

    infopt profile --calibrate
    python docs/results/profile_predictions.py [--model DIR] [--output predictions.jsonl]

Decode at batch 1, 4, 16 and contexts 128, 1024; prefill of 128, 512 and 1024 tokens; each the
median of its runs. The kernels that the predictions follow were measured before, on other shapes;
beside each row stands what a reading and a computing product do now over what they did then.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from infopt.core.artifact.locate import locate
from infopt.core.artifact.read import Artifact
from infopt.core.hardware.probe import probe
from infopt.core.libraries import share_cores
from infopt.core.profiling.drift import drift
from infopt.core.profiling.shape import shape_of
from infopt.core.profiling.subject import static_of, target_of
from infopt.core.profiling.timer import repeat
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.phases import PhaseRunner

FORMATS = {
    "dense": None,
    "W8A8-int8": ["--method", "rtn", "--scheme", "W8A8-int8"],
    "W4A16 g64": ["--method", "rtn", "--bits", "4", "--group-size", "64"],
}


def quantized(model: str, options: list[str], folder: Path) -> str:
    command = [str(Path(sys.executable).parent / "infopt"), "quantize", model, *options]
    subprocess.run([*command, "--output", str(folder), "--quiet"], check=True)
    return str(folder)


def rows(name: str, artifact: Artifact) -> list[dict[str, Any]]:
    runner = PhaseRunner(artifact, EngineSettings(device="cpu"))
    found = []
    for batch in (1, 4, 16):
        for context in (128, 1024):
            settings = ProfileSettings(context=context, batch=batch, output_tokens=32)
            runner.prepare_decode(batch, context)
            times = repeat(runner.decode_step, warmup=3, runs=12)
            found.append(row(name, artifact, "decode", settings, times.median))
    for tokens in (128, 512, 1024):
        settings = ProfileSettings(prompt_tokens=tokens, output_tokens=2)
        times = repeat(lambda: runner.prefill(1, tokens), warmup=1, runs=3)  # noqa: B023
        found.append(row(name, artifact, "prefill", settings, times.median))
    return found


def row(
    name: str, artifact: Artifact, phase: str, settings: ProfileSettings, measured: float
) -> dict[str, Any]:
    static = static_of(artifact, shape_of(artifact.config), settings, target_of(settings, probe()))
    told = static.predicted
    assert told is not None and told.source == "kernels", "run infopt profile --calibrate before"
    predicted = told.tpot_s if phase == "decode" else told.ttft_s
    from torch import device

    kernels = target_of(settings, probe()).kernels
    assert kernels is not None
    now = drift(kernels, device("cpu"))
    assert now is not None
    found = {
        "format": name,
        "phase": phase,
        "batch": settings.batch,
        "tokens": static.context if phase == "decode" else settings.prompt_tokens,
        "predicted_ms": 1e3 * predicted,
        "measured_ms": 1e3 * measured,
        "off": measured / predicted - 1,
        "reading_now": now.reading,
        "computing_now": now.computing,
    }
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    share_cores()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in FORMATS.items():
            word = given.model
            if options is not None:
                word = quantized(given.model, options, Path(folder) / name.replace(" ", "-"))
            found += rows(name, locate(word))
    for phase in ("decode", "prefill"):
        off = [abs(one["off"]) for one in found if one["phase"] == phase]
        print(phase, f"median |off| {statistics.median(off):.0%}, worst {max(off):.0%}")
    if given.output is not None:
        given.output.write_text("".join(json.dumps(one) + "\n" for one in found))


if __name__ == "__main__":
    main()
