"""Make the table of docs/results/quantization.md: every method on the default model.

    python docs/results/quantization_table.py --output rows.jsonl [--only NAME ...] [--print]

Each row quantizes by the command line, then evaluates the artifact read back from disk against
the original (4,096 held-out tokens, float32). Rows that the file has already are not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

SEEDS = (0, 1, 2)
COMMON = ["--samples", "16", "--sequence-length", "512"]
_FEW = "--method autoround --iterations 50 --group-size 64 "  # a quarter of the default's steps
# name: options, whether three seeds are run (where the text is drawn by the seed)
ROWS: dict[str, tuple[str, bool]] = {
    "RTN W8A16": ("--method rtn --bits 8 --group-size 64", False),
    "RTN W4A16": ("--method rtn --bits 4 --group-size 64", False),
    "RTN W3A16": ("--method rtn --bits 3 --group-size 64", False),
    "RTN W2A16": ("--method rtn --bits 2 --group-size 64", False),
    "RTN W4A16 asym": ("--method rtn --bits 4 --group-size 64 --asym", False),
    "RTN W3A16 asym": ("--method rtn --bits 3 --group-size 64 --asym", False),
    "GPTQ W8A16": ("--method gptq --bits 8 --group-size 64", False),
    "GPTQ W4A16": ("--method gptq --bits 4 --group-size 64", True),
    "GPTQ W3A16": ("--method gptq --bits 3 --group-size 64", True),
    "GPTQ W2A16": ("--method gptq --bits 2 --group-size 64", False),
    "GPTAQ W4A16": ("--method gptq --gptaq 0.25 --bits 4 --group-size 64", False),
    "GPTAQ W3A16": ("--method gptq --gptaq 0.25 --bits 3 --group-size 64", False),
    "AWQ W4A16 sym": ("--method awq --bits 4 --group-size 64 --sym", True),
    "AWQ W3A16 sym": ("--method awq --bits 3 --group-size 64 --sym", True),
    "AWQ W4A16 asym": ("--method awq --bits 4 --group-size 64", False),
    "AWQ W3A16 asym": ("--method awq --bits 3 --group-size 64", False),
    "AutoRound W4A16, 50 steps": (_FEW + "--bits 4", False),
    "AutoRound W3A16, 50 steps": (_FEW + "--bits 3", False),
    "AutoRound W2A16, 50 steps": (_FEW + "--bits 2", False),
    "AutoRound W3A16": ("--method autoround --bits 3 --group-size 64", False),
    "QAT W3A16, 40 steps": ("--method qat --bits 3 --group-size 64 --steps 40", False),
    "QAT W2A16, 40 steps": ("--method qat --bits 2 --group-size 64 --steps 40", False),
    "NF4": ("--method nf4", False),
    "NF4, plain scales": ("--method nf4 --no-double-quant", False),
    "mixed 3.5": ("--target-bits 3.5 --group-size 64", False),
    "W8A8-int8, plain": ("--method rtn --scheme W8A8-int8", False),
    "SmoothQuant W8A8-int8": ("--method smoothquant", True),
    "LLM.int8, threshold 6": ("--method llm-int8", False),
    "LLM.int8, threshold 2": ("--method llm-int8 --threshold 2", False),
    "LLM.int8, threshold 1": ("--method llm-int8 --threshold 1", False),
    "LLM.int8, threshold 0.5": ("--method llm-int8 --threshold 0.5", False),
    "FP8 dynamic": ("--method fp8", False),
    "FP8 static": ("--method fp8 --fp8 static", False),
    "RTN W4A8-int8": ("--method rtn --scheme W4A8-int8 --group-size 64", False),
    "GPTQ W4A8-int8": ("--method gptq --scheme W4A8-int8 --group-size 64", False),
    "rotate + GPTQ W4A8-int8": ("--method rotate --scheme W4A8-int8 --group-size 64", False),
    "GPTQ W4A4-int4": ("--method gptq --scheme W4A4-int4 --group-size 64", True),
    "rotate + GPTQ W4A4-int4": ("--method rotate --scheme W4A4-int4 --group-size 64", True),
    "rotate + GPTQ W4A16": ("--method rotate --bits 4 --group-size 64", False),
    "GPTQ W4A16, KV int8": ("--method gptq --bits 4 --group-size 64 --kv-cache int8", False),
    "GPTQ W4A16, KV fp8": ("--method gptq --bits 4 --group-size 64 --kv-cache fp8", False),
}
_NO_TEXT = ("rtn", "nf4", "llm-int8")


def infopt(*words: str) -> dict[str, Any]:
    """The report of a command."""
    command = [str(Path(sys.executable).parent / "infopt"), *words, "--quiet", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_row(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Quantize, evaluate, forget the weights."""
    options = ROWS[name][0].split()
    method = options[1] if options[0] == "--method" else "gptq"
    fp8_dynamic = method == "fp8" and "static" not in options
    text = [] if method in _NO_TEXT or fp8_dynamic else COMMON
    if method == "qat":
        text = ["--samples", "64", "--sequence-length", "512"]  # it has to learn from it
    made = infopt("quantize", "default", *options, *text, "--seed", str(seed), "-o", str(folder))
    told = infopt(
        "evaluate", str(folder), "--baseline", "default", "--tokens", "4096", "--dtype", "float32"
    )
    shutil.rmtree(folder)
    keys = ("bits_per_weight", "bytes", "seconds", "peak_memory_bytes", "format")
    quality = ("delta_nll", "kl_divergence", "top1_agreement", "perplexity")
    return {
        "name": name,
        "seed": seed,
        "options": " ".join([*options, *text]),
        **{key: made[key] for key in keys},
        **{key: told[key] for key in quality},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the mean over seeds, with the spread of the NLL."""
    lines = [
        "| method | format | MB | bits | ΔNLL | spread | KL | top-1 | s | peak GB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in ROWS:
        found = [row for row in rows if row["name"] == name]
        if not found:
            continue
        losses = [row["delta_nll"] for row in found]

        def average(key: str, found: list[dict[str, Any]] = found) -> float:
            return mean(row[key] for row in found)

        spread = f"{min(losses):.4f} … {max(losses):.4f}" if len(found) > 1 else ""
        lines.append(
            f"| {name} | {found[0]['format'] or 'dense'} | {average('bytes') / 1e6:.1f} "
            f"| {average('bits_per_weight'):.2f} | {mean(losses):.4f} | {spread} "
            f"| {average('kl_divergence'):.4f} | {average('top1_agreement'):.1%} "
            f"| {average('seconds'):.0f} | {average('peak_memory_bytes') / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(ROWS))
    parser.add_argument("--print", action="store_true", help="print the table, make nothing")
    given = parser.parse_args()
    rows = []
    if given.output.exists():
        rows = [json.loads(line) for line in given.output.read_text().splitlines()]
    if not given.print:
        done = {(row["name"], row["seed"]) for row in rows}
        wanted = [(n, s) for s in SEEDS for n in given.only if s == SEEDS[0] or ROWS[n][1]]
        with tempfile.TemporaryDirectory() as scratch:
            for name, seed in wanted:
                if (name, seed) in done:
                    continue
                rows.append(make_row(name, seed, Path(scratch) / "model"))
                with given.output.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
