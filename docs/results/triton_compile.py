"""Write docs/results/triton-compile.md: what the kernels compile to, in the tiles that ship.

python docs/results/triton_compile.py            (no GPU; about three minutes on two cores)
"""

import re
from collections.abc import Iterator
from pathlib import Path

from infopt.core.hardware.card import compiler_versions
from infopt.kernels.gpu.compiled import CARDS, Compiled, compile_examples

PAGE = Path(__file__).with_name("triton-compile.md")
HEAD = """\
# What the Triton kernels compile to

Drawn by `python docs/results/triton_compile.py` with {versions}; no GPU was there, and nothing here
was timed. Registers are of a thread, shared memory of a block of threads; a spill is a load or a
store of what did not fit into registers. The compile gate (`tests/kernels/gpu/test_compiled.py`)
holds every line to no spills, to a Hopper's 232,448 bytes of shared memory (sm_90) or to a desktop
card's 101,376 (sm_80, whose tiles all cards without a Hopper's memory take), and the larger
products of sm_90 to HGMMA.
"""
TOLD = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "UTMALDG", "LDGSTS")
SHOWN = re.compile(r"\b(BLOCK_[A-Z]+|SPLITS|num_warps|num_stages)=(\d+)")


def lines(capability: int) -> Iterator[str]:
    name = CARDS[capability]["name"].removeprefix("NVIDIA ")
    yield f"\n## sm_{capability}, as an {name} has it\n"
    yield "| launch | kernel | tile | registers | shared memory | spills | instructions |"
    yield "|---|---|---|---:|---:|---:|---|"
    for one in compile_examples(capability):
        yield f"| {one.example} | `{one.kernel}` | {tile(one)} | {one.registers} | " + (
            f"{one.shared_bytes:,} | {one.spills} | {instructions(one)} |"
        )


def tile(one: Compiled) -> str:
    words = dict(SHOWN.findall(one.tile))
    sizes = " x ".join(words[w] for w in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_H") if w in words)
    rest = [f"{words['num_warps']} warps"]
    if int(words.get("num_stages", 1)) > 1:
        rest.append(f"{words['num_stages']} stages")
    if int(words.get("SPLITS", 1)) > 1:
        rest.append(f"{words['SPLITS']} splits")
    return ", ".join([sizes, *rest] if sizes else rest).replace("1 warps", "1 warp")


def instructions(one: Compiled) -> str:
    return ", ".join(f"{n} {word}" for word in TOLD if (n := one.instructions.get(word)))


if __name__ == "__main__":
    found = [line for capability in CARDS for line in lines(capability)]
    PAGE.write_text(HEAD.format(versions=compiler_versions()) + "\n".join(found) + "\n")
