"""A launch as a model makes it: what the compile gate compiles and the tuner times."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from infopt.kernels.gpu.tile import Card, Key, Tile

Launch = Callable[[Card], object]
"""Launches over inputs that are there, with the tiles that the card has for it."""


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs of one shape, and the launch over them."""

    name: str
    kernel: str
    """Whose tile is chosen."""
    key: Key
    """By which it is chosen."""
    build: Callable[[torch.device], Launch]
    """Makes the inputs; on `meta` they have no memory."""
    candidates: tuple[Tile, ...] = ()
    """That the tuner tries."""
    wants: tuple[str, ...] = ()
    """Instructions that the main kernel must have on a Hopper."""
    since: int = 80
    """The compute capability from which GPUs can do it."""
