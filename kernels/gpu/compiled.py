"""What kernels compile to, told without a GPU: registers, spills, shared memory, instructions.

`python -m infopt.kernels.gpu.compiled 90 [NAME ...]` compiles the examples for sm_90 and writes
what it found as JSON. A process compiles for one target: a second would find the first's kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from infopt.kernels.gpu.example import Example
from infopt.kernels.gpu.examples import EXAMPLES
from infopt.kernels.gpu.tile import A100, H100, Card

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TOLD = (
    "HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "I2F",
)  # fmt: skip
CARDS: Mapping[int, Mapping[str, Any]] = {80: A100, 90: H100}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel of one example."""

    example: str
    kernel: str
    tile: str
    """Its constants, warps and stages."""
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: what does not fit into registers lies there."""
    shared_bytes: int
    """Of a block of threads."""
    instructions: Mapping[str, int]
    """How often those that tell something occur in the machine code."""

    @property
    def spills(self) -> int:
        """Loads and stores of what did not fit into registers."""
        return self.instructions.get("LDL", 0) + self.instructions.get("STL", 0)


class _StandIn:
    """A driver that says which target kernels are for, and launches none."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self._card = CARDS[capability]

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    @property
    def utils(self) -> "_StandIn":
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._card["shared_bytes"],
            "multiprocessor_count": self._card["processors"],
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def launcher_cls(self, *_: object, **__: object) -> None:
        return None

    def map_python_to_cpp_type(self, _: str) -> str:
        return "int"


@contextmanager
def _instead_of_launches() -> Iterator[list[tuple[str, dict[str, Any], Any]]]:
    """Every launch compiles and goes no further: (kernel, its options, what came out)."""
    found: list[tuple[str, dict[str, Any], Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        shown = {name: value for name, value in options.items() if _is_small(value)}
        found.append((self.__name__, shown, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch


def _is_small(value: object) -> bool:
    return isinstance(value, int | str) or value is None


def compile_here(capability: int, examples: Sequence[Example]) -> list[Compiled]:
    """Compile what the examples launch, their tensors without memory, in this process."""
    driver.set_active(_StandIn(capability))
    card = Card.with_shipped(**CARDS[capability])
    found = []
    for example in (one for one in examples if one.since <= capability):
        launch = example.build(torch.device("meta"))
        with _instead_of_launches() as launched:
            launch(card)
        found += [_told(example.name, *one) for one in launched]
    return found


def compile_examples(capability: int, names: Sequence[str] = ()) -> list[Compiled]:
    """The same in a process of its own; all examples where none is named."""
    command = [sys.executable, "-m", "infopt.kernels.gpu.compiled", str(capability), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_plain())
    if done.returncode:
        raise RuntimeError(f"compiling for sm_{capability} failed:\n{done.stderr[-4000:]}")
    return [Compiled(**one) for one in json.loads(done.stdout)]


def _plain() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _told(example: str, name: str, options: Mapping[str, Any], kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "--dump-sass", file.name)
    counts = {word: len(re.findall(rf"\b{word}\b", code)) for word in _TOLD}
    return Compiled(
        example=example,
        kernel=name,
        tile=" ".join(f"{word}={value}" for word, value in options.items()),
        registers=_number(usage, "REG"),
        stack_bytes=_number(usage, "STACK"),
        shared_bytes=kernel.metadata.shared,
        instructions={word: count for word, count in counts.items() if count},
    )


def _number(usage: str, word: str) -> int:
    found = re.search(rf"{word}:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1))


def _tool(name: str, *words: str) -> str:
    return subprocess.run(
        [str(_TOOLS / name), *words], capture_output=True, text=True, check=True
    ).stdout


def main(words: Sequence[str], write: Callable[[str], object]) -> None:
    """Compile for the capability words[0] the examples named by the rest, or all."""
    names = set(words[1:])
    chosen = [example for example in EXAMPLES if not names or example.name in names]
    assert not names or len(chosen) == len(names), "an example has no such name"
    write(json.dumps([asdict(one) for one in compile_here(int(words[0]), chosen)]))


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdout.write)
