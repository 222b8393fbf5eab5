"""What a step of training depends on, as functions of its number: nothing to remember."""

import math

import torch


def cosine_rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the full learning rate at a step from 0: a rise over `warm_up`, then a cosine
    down to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


def windows_of_step(step: int, count: int, windows: int, seed: int) -> list[int]:
    """Which `count` of `windows` a step sees: a new order each round, and nothing to remember."""
    first = step * count
    found = []
    for position in range(first, first + count):
        generator = torch.Generator().manual_seed(seed + position // windows)
        order = torch.randperm(windows, generator=generator)
        found.append(int(order[position % windows]))
    return found
