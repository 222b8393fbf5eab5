"""How kernels are launched on a card: tiles as data, those that ship and those that were measured.

Nothing here looks for the best tile, and nothing imports Triton: a tile is read from a table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HOPPER_SHARED = 232_448
"""Bytes of shared memory that a block of threads may have on an H100, a B200."""
SMALL_SHARED = 101_376
"""And on every card since Ampere."""

_FOLDER = Path(__file__).with_name("tiles")

Key = Mapping[str, int | str]
"""What a tile is chosen by: of a launch, its sizes and dtypes by name."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The constants of a kernel, the warps and the stages of its pipeline."""

    constants: Mapping[str, int]
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}

    def as_json(self) -> dict[str, Any]:
        return {"constants": dict(self.constants), "warps": self.warps, "stages": self.stages}


@dataclass(frozen=True, slots=True)
class Rule:
    """A tile, and the launches that it is for: each part of a key equal, or within two bounds."""

    when: Mapping[str, Any]
    tile: Tile

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Rule":
        tile = Tile(found["constants"], found["warps"], found["stages"])
        return cls(found.get("when", {}), tile)

    def applies(self, key: Key) -> bool:
        return all(_within(key[part], wanted) for part, wanted in self.when.items())


def _within(value: int | str, wanted: Any) -> bool:
    if not isinstance(wanted, list):
        return bool(value == wanted)
    low, high = wanted
    assert not isinstance(value, str)
    return bool(low <= value and (high is None or value <= high))


Rules = Mapping[str, Sequence[Rule]]
"""By kernel; the first rule that applies is taken."""


def rules_from(text: str) -> Rules:
    """The rules of a table {"kernels": {name: [{"when", "constants", "warps", "stages"}]}}.

    Raises ValueError, KeyError or TypeError for a text that is no such table.
    """
    kernels = json.loads(text)["kernels"]
    return {name: [Rule.from_json(rule) for rule in rules] for name, rules in kernels.items()}


def shipped(capability: int, shared_bytes: int) -> Rules:
    """The tiles that infopt ships for a card: chosen by what they compile to, not timed."""
    large = capability >= 90 and shared_bytes >= HOPPER_SHARED
    files = sorted(_FOLDER.glob("sm_90*.json" if large else "sm_80*.json"))
    return {name: rules for file in files for name, rules in rules_from(file.read_text()).items()}


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU that kernels are launched on, and the tiles that they take there."""

    name: str
    capability: int
    """90 for an H100."""
    processors: int
    shared_bytes: int
    """That a block of threads may have."""
    rules: Rules

    @classmethod
    def with_shipped(
        cls, name: str, *, capability: int, processors: int, shared_bytes: int
    ) -> "Card":
        return cls(name, capability, processors, shared_bytes, shipped(capability, shared_bytes))

    @classmethod
    def at_hand(cls, device: "torch.device") -> "Card":
        """A GPU that torch sees, with the tiles that ship."""
        import torch

        found: Any = torch.cuda.get_device_properties(device)
        return cls.with_shipped(
            found.name,
            capability=10 * found.major + found.minor,
            processors=found.multi_processor_count,
            shared_bytes=found.shared_memory_per_block_optin,
        )

    def tile(self, kernel: str, **key: int | str) -> Tile:
        """Of the first rule for `kernel` that applies; there is always one."""
        for rule in self.rules[kernel]:
            if rule.applies(key):
                return rule.tile
        raise AssertionError(f"no tile of {kernel} is for {key}")

    def preferring(self, rules: Rules) -> "Card":
        """The same, other rules before its own."""
        names = {*self.rules, *rules}
        both = {name: [*rules.get(name, ()), *self.rules.get(name, ())] for name in names}
        return replace(self, rules=both)


H100 = {"name": "NVIDIA H100", "capability": 90, "processors": 132, "shared_bytes": HOPPER_SHARED}
A100 = {"name": "NVIDIA A100", "capability": 80, "processors": 108, "shared_bytes": 166_912}


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up."""
    return -(-numerator // denominator)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest that is no less than `number`, nor than `least`."""
    return max(least, 1 << max(number - 1, 0).bit_length())
