"""Trees of guesses as attention wants them: what each node sees, and where it stands.

Several continuations of a request are verified in one step, each node a query (SpecInfer, Miao et
al. 2024, arXiv 2305.09781; Medusa, Cai et al. 2024, arXiv 2401.10774). Their keys and values are
written into the slots behind the context, node after node; those of nodes that are not accepted
are written over by the next step.
"""

from collections.abc import Sequence

import torch

from infopt.kernels.gpu.paged_attention import Tree
from infopt.kernels.gpu.tile import cdiv

_ALIGNED = 16
"""Widths are multiples of it, so that one kernel serves trees of many sizes."""


def plan_tree(
    parents: Sequence[Sequence[int]], contexts: Sequence[int], device: torch.device
) -> Tree:
    """Of each request the parent of each of its nodes: one of those before it, or -1 for one that
    follows the context itself; `contexts`: tokens of each in the cache, the nodes among them.

    Raises AssertionError for a parent that does not come before its child.
    """
    width = cdiv(max(map(len, parents), default=1), _ALIGNED) * _ALIGNED
    seen = torch.zeros(sum(map(len, parents)), width, dtype=torch.uint8)
    positions: list[int] = []
    row = 0
    for nodes, context in zip(parents, contexts, strict=True):
        for node, parent in enumerate(nodes):
            assert -1 <= parent < node, "a node's parent comes before it"
            if parent >= 0:
                seen[row + node] = seen[row + parent]
            seen[row + node, node] = 1
            above = 0 if parent < 0 else positions[row + parent] - (context - len(nodes)) + 1
            positions.append(context - len(nodes) + above)
        row += len(nodes)
    pinned = device.type == "cuda"
    where = torch.tensor(positions, dtype=torch.int32)
    if pinned:
        seen, where = seen.pin_memory(), where.pin_memory()
    return Tree(seen.to(device, non_blocking=pinned), where.to(device, non_blocking=pinned))
