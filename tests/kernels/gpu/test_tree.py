"""Trees of guesses: a node's result is what its path gives when it is computed token by token."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infopt.kernels.attention.scores import Scores
from infopt.kernels.gpu import tree as module
from infopt.kernels.gpu.cache import new_cache
from infopt.kernels.gpu.paged_attention import Part, paged_attention, reference
from infopt.kernels.gpu.plan import plan_part
from infopt.kernels.gpu.tile import Card, Tile

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 16, 4
PARENTS = [[-1, 0, 0, 1, 3, -1, 5], [-1], [-1, -1, 1, 2, 2]]
PAST = [11, 3, 26]
SCORES = {"plain": Scores(0.25), "window": Scores(0.25, window=6)}


def path_of(parents: list[int], node: int) -> list[int]:
    """From the first node down to this one."""
    found: list[int] = []
    while node >= 0:
        found.insert(0, node)
        node = parents[node]
    return found


def alone(past: Tensor, nodes: Tensor, query: Tensor, scores: Scores) -> Tensor:
    """The last token of a plain sequence, keys and values [tokens, 2 * kv_heads, head_dim]."""
    whole = torch.cat((past, nodes))
    blocks = -(-len(whole) // BLOCK)
    cache = new_cache(blocks, BLOCK, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache.view(-1, 2 * KV_HEADS, HEAD_DIM)[: len(whole)] = whole
    one = torch.tensor([0, 1])
    part = Part(one, one, torch.tensor([len(whole)]), torch.arange(blocks)[None])
    return reference(query[None], cache, KV_HEADS, part, scores)[0]


def check(scores: Scores, device: torch.device, card: Card, trees: ModuleType = module) -> None:
    torch.manual_seed(0)
    contexts = [past + len(nodes) for past, nodes in zip(PAST, PARENTS, strict=True)]
    tables = [range(10 * r, 10 * r + 10) for r in range(3)]
    cache = new_cache(30, BLOCK, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache.fill_(torch.nan)
    rows = cache.view(-1, 2 * KV_HEADS, HEAD_DIM)
    for request, context in enumerate(contexts):
        first = 10 * BLOCK * request
        rows[first : first + context] = torch.randn(context, 2 * KV_HEADS, HEAD_DIM)
    lengths = [len(nodes) for nodes in PARENTS]
    query = torch.randn(sum(lengths), HEADS, HEAD_DIM)
    tile = Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 2)
    part = plan_part(
        card, tile, tables, contexts, lengths, heads=HEADS, kv_heads=KV_HEADS, device=device
    )
    out = torch.full_like(query, torch.nan).to(device)
    planned = trees.plan_tree(PARENTS, contexts, device)
    paged_attention(
        card, query.to(device), cache.to(device), KV_HEADS, part, scores, tile, out, planned
    )
    row = 0
    for request, nodes in enumerate(PARENTS):
        first = 10 * BLOCK * request
        held = rows[first : first + contexts[request]].split([PAST[request], len(nodes)])
        for node in range(len(nodes)):
            wanted = alone(held[0], held[1][path_of(nodes, node)], query[row], scores)
            torch.testing.assert_close(out[row].double().cpu(), wanted, atol=1e-5, rtol=1e-5)
            row += 1


@pytest.mark.parametrize("name", SCORES)
def test_a_node_is_what_its_path_gives_alone(name: str, device: torch.device, card: Card) -> None:
    check(SCORES[name], device, card)


MUTATIONS = {
    "an ancestor": ("seen[row + node] = seen[row + parent]", "pass"),
    "itself": ("seen[row + node, node] = 1", "pass"),
    "its place": ("(context - len(nodes)) + 1", "(context - len(nodes)) + 3"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_tree_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    wrong = mutated(module, *MUTATIONS[name])
    with pytest.raises(AssertionError, match="not close"):
        check(SCORES["window"], device, card, wrong)


def test_nodes_stand_behind_their_parents() -> None:
    found = module.plan_tree(PARENTS, [18, 4, 31], torch.device("cpu"))
    assert found.positions.tolist() == [11, 12, 12, 13, 14, 11, 12, 3, 26, 26, 27, 28, 28]
    assert found.seen.shape == (13, 16)
    assert found.seen[4, :7].tolist() == [1, 1, 0, 1, 1, 0, 0]
    assert found.seen[12, :7].tolist() == [0, 1, 1, 0, 1, 0, 0]


def test_a_parent_comes_before_its_child() -> None:
    with pytest.raises(AssertionError, match="comes before"):
        module.plan_tree([[-1, 1]], [5], torch.device("cpu"))
