"""Which linear layers a compression method changes, and which sizes of groups fit them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.models.experts import Experts, experts_around
from infopt.core.models.hf import blocks
from infopt.core.recipe.base import nearest
from infopt.core.recipe.quantize import GroupSize

GROUP_SIZES = (128, 64, 32)
_ALWAYS_ALLOWED = "lm_head"


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer [outputs, inputs] by its full name."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class TargetBlock:
    """A block and its targets, in the order of the model's definition."""

    name: str
    targets: tuple[Target, ...]


def find_targets(model: PreTrainedModel, ignore: Sequence[str]) -> tuple[TargetBlock, ...]:
    """The linear layers within the blocks, less those that a pattern of `ignore` names.

    Layers outside of the blocks (lm_head) are never targets, and routers of experts neither (see
    `find_routers`). Raises UsageError for a pattern that names nothing, UnsupportedError for a
    block with weights that are no linear layers.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in ignore:
        known = any(fnmatchcase(name, pattern) for name, _ in model.named_modules())
        if not known and pattern != _ALWAYS_ALLOWED:
            raise UsageError(
                f"ignore: {pattern!r} names no layer of {type(model).__name__}",
                nearest(pattern, linears) if len(linears) < 8 else _close(pattern, linears),
            )
    routers = find_routers(model)
    found: list[TargetBlock] = []
    others: list[tuple[str, str]] = []
    for block_name, block in blocks(model):
        targets = []
        for local, module in block.named_modules():
            name = f"{block_name}.{local}" if local else block_name
            if name in routers or any(fnmatchcase(name, pattern) for pattern in ignore):
                continue
            if isinstance(module, nn.Linear):
                targets.append(Target(name, module.out_features, module.in_features))
            else:
                others += [(name, key) for key in _other_weights(module)]
        found.append(TargetBlock(block_name, tuple(targets)))
    if others:
        raise _no_linear_layers(model, others)
    if not any(block.targets for block in found):
        raise UsageError("ignore leaves no linear layer to compress")
    return tuple(found)


def find_routers(model: PreTrainedModel) -> dict[str, str]:
    """The modules of blocks with experts that choose among them, and in plain words why so.

    Such a module has an output for each expert, or a single one that weighs a shared expert. They
    are tiny, and an error of theirs sends a token to another expert: every method leaves them.
    """
    return {
        f"{block_name}.{local}": reason
        for block_name, block in blocks(model)
        for local, reason in _routers(block)
    }


def stages(
    model: PreTrainedModel, groups: Sequence[tuple[str, ...]]
) -> list[list[tuple[str, ...]]]:
    """Groups of layers in the order in which they feed each other, those that do not together.

    No expert feeds another, so the same projection of all of them is one stage: what a group for
    each expert would take as many passes to see, one pass shows.
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    for group in groups:
        found.setdefault(_stage(model, group[0]), []).append(group)
    return list(found.values())


def choose_group_size(wanted: GroupSize, targets: Sequence[Target]) -> int | None:
    """Input columns per group; None for the whole row.

    'auto' is the largest of 128, 64, 32 that divides every layer, else the row. Raises UsageError
    for a size that does not divide, naming those that do.
    """
    fitting = [size for size in GROUP_SIZES if all(t.inputs % size == 0 for t in targets)]
    match wanted:
        case "channel":
            return None
        case "auto":
            return fitting[0] if fitting else None
        case int() if wanted in fitting:
            return wanted
    odd = next(t for t in targets if t.inputs % wanted)
    raise UsageError(
        f"group_size {wanted} does not divide the {odd.inputs} input columns of {odd.name}",
        "these fit every layer: " + ", ".join([str(size) for size in fitting] + ["channel"]),
    )


def _routers(block: nn.Module) -> Iterator[tuple[str, str]]:
    owners = {name: m for name, m in block.named_modules() if isinstance(m, Experts)}
    counts = {module.num_experts for module in owners.values()}
    within = tuple(f"{name}." for name in owners)
    for local, module in block.named_modules() if owners else ():
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 2]
        if local.startswith(within) or not shapes or isinstance(module, nn.Embedding):
            continue
        sizes = {size for shape in shapes for size in shape}
        if isinstance(module, nn.Linear):
            sizes = {module.out_features}
        if sizes & counts:
            yield local, f"it chooses among the {min(sizes & counts)} experts of its layer"
        elif isinstance(module, nn.Linear) and module.out_features == 1:
            yield local, "it weighs the shared expert of its layer"


def _stage(model: PreTrainedModel, name: str) -> str:
    around = experts_around(model, f"{name}.weight")
    return name if around is None else f"{around[0]}.*.{name.rpartition('.')[2]}"


def _other_weights(module: nn.Module) -> list[str]:
    """Matrices of a module that is neither a linear layer nor an embedding."""
    if isinstance(module, nn.Embedding):
        return []
    return [key for key, p in module.named_parameters(recurse=False) if p.ndim > 1]


def _no_linear_layers(
    model: PreTrainedModel, others: Sequence[tuple[str, str]]
) -> UnsupportedError:
    name, key = others[0]
    names = list(dict.fromkeys(name for name, _ in others))
    patterns = dict.fromkeys(f"*.{n.rpartition('.')[2]}" for n in names)
    return UnsupportedError(
        f"{name}.{key} is a {type(model.get_submodule(name)).__name__}, and infopt compresses only "
        "torch.nn.Linear, Conv1D and the experts of a mixture",
        "leave such modules as they are: "
        + " ".join(f"--ignore '{p}'" for p in (patterns if len(names) > 1 else names)),
    )


def _close(pattern: str, linears: Sequence[str]) -> str:
    """The nearest of many names: of whole names, or of their last parts."""
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    hint = nearest(pattern, [*linears, *leaves, *(f"*.{leaf}" for leaf in leaves)])
    return hint if hint.startswith("did") else "the layers end in: " + ", ".join(leaves)


def ignore_pattern(targets: Sequence[Target]) -> str:
    """What --ignore takes to leave out these layers: their shared last name, or the first."""
    leaves = {t.name.rpartition(".")[2] for t in targets}
    return targets[0].name if len(leaves) > 1 or len(targets) == 1 else f"*.{leaves.pop()}"
