"""The block-by-block walk through a model that every compression method shares.

Only one block's weights are in memory at a time, and for every calibration batch the hidden
states between two blocks, unless these are kept on disk. What else a block is called with
(positions, masks) is recorded from one forward pass of the model in which every block hands its
input on, so no model needs its own code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.finite import all_finite
from infopt.core.compression.offload import Store, in_memory
from infopt.core.compression.replay import Replay, Tail, find_tail, replace_forward
from infopt.core.compression.targets import Target
from infopt.core.errors import NumericsError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.scheme import KvFormat
from infopt.core.libraries import return_memory
from infopt.core.models.experts import Calibration, calibrate_experts
from infopt.core.models.hf import blocks, materialize, release, resolve, skeleton, tie
from infopt.core.models.inputs import round_inputs_as_stored, round_layer_inputs
from infopt.core.models.kv_rounding import round_kv, round_kv_as_stored

Sink = Callable[[str, Tensor], None]
"""Is handed the name of a layer and its input [batch, length, K]."""

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """What was wanted of a forward pass has been seen."""


class Walk:
    """A model on its way: `hidden` are the inputs of the block `position`, one tensor a batch.

    The first batch is the probe: a few tokens that show how a block runs and what the model makes
    of them in the end; `inputs` leaves it out. `names` are the blocks' names.
    """

    def __init__(
        self,
        artifact: Artifact,
        probe: Tensor,
        batches: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep_bytes: int = 0,
        experts: Calibration | None = None,
        store: Store = in_memory,
    ) -> None:
        """probe and batches: int64 [batch, length]; keep_bytes: memory that `settle` may use;
        experts: which tokens an MoE's experts are shown beside what they are asked; store: keeps
        the hidden states."""
        self.artifact, self.dtype, self.device = artifact, dtype, device
        self.tokens = (probe, *batches)
        self.model: PreTrainedModel = skeleton(artifact, dtype)
        self._experts: Calibration | None = experts
        calibrate_experts(self.model, experts)
        if artifact.quantization is not None:
            round_inputs_as_stored(
                self.model, artifact, lambda name: resolve(self.model, artifact, name)
            )
            round_kv_as_stored(self.model, artifact)
        self.names = [name for name, _ in blocks(self.model)]
        self._blocks = [block for _, block in blocks(self.model)]
        self._returns_tuple = False
        self._calls: list[list[_Call]] = []
        self.position = 0
        self.hidden: list[Tensor] = []
        self._store = store
        self._replay = Replay(keep_bytes)
        self._targets: frozenset[str] = frozenset()
        self._settled: set[str] = set()
        self._tails: dict[str, tuple[str, Tail]] = {}
        self._held_after: dict[str, frozenset[str]] = {}
        self._rounding: list[RemovableHandle] = []

    @torch.no_grad()
    def start(self) -> None:
        """Embed the tokens, record how each block is called, and stand before the first block."""
        self.fill_outside()
        self.hidden, self._calls, self.position = [], [], 0
        self._returns_tuple = self._first_returns_tuple()
        pool: dict[tuple[Any, ...], Tensor] = {}
        for index in range(len(self.tokens)):
            calls = [_part(*call) for call in self._record(index, stop_at=len(self._blocks) - 1)]
            self.hidden.append(self._store(calls[0][0]))
            self._calls.append([_shared(rest, (i,), pool) for i, (_, rest) in enumerate(calls)])
        release(self.model)

    def skip_to(self, position: int, hidden: Iterable[Tensor]) -> None:
        """After `start`: stand before the block `position` with an earlier walk's states."""
        self.position, self.hidden = position, [self._store(part) for part in hidden]
        assert len(self.hidden) == len(self.tokens)

    def load(self) -> None:
        """Read the weights of the block to come; `advance` releases them."""
        block, name = self._blocks[self.position], self.names[self.position]
        materialize(self.model, name, block, self.artifact, self.dtype, self.device)

    def layer(self, name: str) -> nn.Linear:
        """A linear layer by its full name."""
        found = self.model.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def round_inputs(self, name: str, form: ActivationFormat, scale: Tensor | None = None) -> None:
        """Let the layer `name` of the loaded block see its inputs rounded, until `advance`."""
        self._rounding.append(round_layer_inputs(self.model, name, form, scale))

    def round_kv(self, scales: Mapping[str, Tensor], form: KvFormat) -> None:
        """Let the loaded block's attention see what a cache would give back, until `advance`."""
        self._rounding.extend(round_kv(self.model, scales, form))

    @property
    def block(self) -> nn.Module:
        """The loaded block."""
        return self._blocks[self.position]

    @torch.no_grad()
    def run_probe(self) -> Tensor:
        """What the loaded block makes of the probe, as its weights are now."""
        return self._forward(0)

    @torch.no_grad()
    def input_groups(self, targets: Sequence[Target]) -> list[tuple[str, ...]]:
        """The targets of the loaded block by the input that they share, in order of their calls.

        Targets that are never called come last, each alone.
        """
        order: list[tuple[Tensor, list[str]]] = []

        def note(name: str, value: Tensor) -> None:
            for known, names in order:
                if known is value:
                    names.append(name)
                    return
            order.append((value, [name]))

        names = [target.name for target in targets]
        self._targets = frozenset(names)
        outputs: dict[nn.Module, Tensor] = {}
        with ExitStack() as hooks:
            self._watch(hooks, names, note)
            self._watch_outputs(hooks, names, outputs)
            self._forward(0)
        called = {name for _, group in order for name in group}
        groups = [tuple(dict.fromkeys(group)) for _, group in order]
        return groups + [(name,) for name in names if name not in called]

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The inputs of the layers `names`, batch by batch; nothing behind them is computed.

        A layer that is not called has no entry; one that is called often has its last input.
        """
        for index in range(1, len(self.tokens)):
            found: dict[str, Tensor] = {}

            def note(name: str, value: Tensor, found: dict[str, Tensor] = found) -> None:
                found[name] = value
                if name in self._tails:
                    self._replay.hold(name, value, self._tails[name][0])
                    self._held_after[name] = frozenset(self._settled)
                if len(found) == len(names):
                    raise _Enough

            with ExitStack() as hooks:
                self._watch(hooks, names, note)
                with suppress(_Enough):
                    self._forward(index)
            yield found

    def settle(self, names: Sequence[str]) -> None:
        """Say that layers of the loaded block have their last weights and, as now, last inputs.

        What they return, and modules whose every target is settled, is kept while `keep_bytes`
        last, so that passes to come need not compute it again. Layers must be settled in the order
        of `input_groups`: then all that a settled module is given is settled too.
        """
        self._settled.update(names)
        for name in names:
            self._replay.add(name, self.layer(name))
        block = self.names[self.position]
        for parent in sorted({p for name in names for p in _parents(name, block)}, key=len):
            inside = {t for t in self._targets if t.startswith(f"{parent}.")}
            if not inside <= self._settled:
                continue
            module = self.model.get_submodule(parent)
            for name, (owner, tail) in self._tails.items():
                # What the tail was given must have been computed by the others as they are now.
                if owner == parent and inside - {name} <= self._held_after.get(name, frozenset()):
                    self._replay.add_tail(name, module, tail)
            self._replay.add(parent, module)

    @torch.no_grad()
    def advance(self, *, keep: bool = False) -> None:
        """Run the loaded block over all batches, release it (or `keep` it), and go to the next."""
        self._replay.recording = False
        for index in range(len(self.tokens)):
            # The probe shows what the model computes in use, to the last bit.
            calibrate_experts(self.model, self._experts if index else None)
            output = self._forward(index).to("cpu")
            self._replay.forget_batch()
            if not all_finite(output):
                raise NumericsError(
                    f"{self.names[self.position]} of {self.artifact.name} computes values "
                    f"that are not finite in {str(self.dtype).removeprefix('torch.')}",
                    "try --dtype float32; if it is so already, the weights are broken",
                )
            self.hidden[index] = self._store(output)
        calibrate_experts(self.model, self._experts)
        self._replay.clear()
        self._replay.recording = True
        self._settled.clear()
        self._tails.clear()
        self._held_after.clear()
        for handle in self._rounding:
            handle.remove()
        self._rounding.clear()
        if not keep:
            release(self._blocks[self.position])
        self.position += 1
        return_memory()

    @torch.no_grad()
    def probe_logits(self) -> Tensor:
        """What the model makes of the probe, after the last block: [batch, length, vocabulary]."""
        assert self.position == len(self._blocks)
        self.fill_outside()
        logits = self.logits(0, self.hidden[0])
        release(self.model)
        return logits.to("cpu")

    @torch.no_grad()
    def logits(self, index: int, hidden: Tensor) -> Tensor:
        """What the model makes of a batch with the states `hidden` after its last block.

        [batch, length, vocabulary], on the device. `fill_outside` comes first; index 0: the probe.
        """
        states = hidden.to(self.device)
        with ExitStack() as stack:
            for block in self._blocks:
                replace_forward(stack, block, lambda *_, **__: self._as_output(states))
            output = self.model(input_ids=self.tokens[index].to(self.device), use_cache=False)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def through(self, position: int, index: int, hidden: Tensor) -> Tensor:
        """What a loaded block makes of `hidden` in the place of a batch's states; on the device."""
        args, kwargs = self._calls[index][position]
        output = self._blocks[position](hidden.to(self.device), *args, **kwargs)
        states: Tensor = output[0] if self._returns_tuple else output
        return states

    def run(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        """What the loaded block makes of a batch with `weights` instead of its own, by full name.

        Gradients reach them, unless under no_grad. Batch 0 is the probe.
        """
        args, kwargs = self._calls[index][self.position]
        local = f"{self.names[self.position]}."
        stand_ins = {name.removeprefix(local): weight for name, weight in weights.items()}
        inputs = (self.hidden[index].to(self.device), *args)
        output = functional_call(self._blocks[self.position], stand_ins, inputs, kwargs)
        hidden: Tensor = output[0] if self._returns_tuple else output
        return hidden

    def _forward(self, index: int) -> Tensor:
        self._replay.batch = index
        return self.through(self.position, index, self.hidden[index])

    def _first_returns_tuple(self) -> bool:
        """Some models' blocks return a tuple, and a hand-me-on must look alike: run one to know."""
        args, kwargs = self._record(0, stop_at=0)[0]
        self.load()
        output = self._blocks[0](*args, **kwargs)
        release(self._blocks[0])
        return isinstance(output, tuple | list)

    def _record(self, index: int, stop_at: int) -> list[_Call]:
        """How the blocks up to `stop_at` are called for a batch when each hands its input on."""
        calls: list[_Call] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if len(calls) > stop_at:
                raise _Enough
            return self._as_output(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for block in self._blocks:
                replace_forward(stack, block, forward)
            with suppress(_Enough):
                self.model(input_ids=self.tokens[index].to(self.device), use_cache=False)
        return calls

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden, None, None) if self._returns_tuple else hidden

    def _watch(self, hooks: ExitStack, names: Sequence[str], sink: Sink) -> None:
        for name in names:

            def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                sink(name, args[0])

            hooks.enter_context(self.layer(name).register_forward_pre_hook(hook))

    def _watch_outputs(
        self, hooks: ExitStack, names: Sequence[str], outputs: dict[nn.Module, Tensor]
    ) -> None:
        """Find the modules of the block that return what one of the layers `names` computed."""
        by_layer: dict[nn.Module, str] = {self.layer(name): name for name in names}
        block = self.names[self.position]

        def layer_hook(module: nn.Module, _: Any, output: Tensor) -> None:
            outputs[module] = output

        def parent_hook(module: nn.Module, _: Any, output: Any, parent: str = "") -> None:
            tail = find_tail(output, outputs)
            if tail is not None and by_layer[tail.layer].startswith(f"{parent}."):
                self._tails[by_layer[tail.layer]] = (parent, tail)

        for layer in by_layer:
            hooks.enter_context(layer.register_forward_hook(layer_hook))
        for parent in {p for name in names for p in _parents(name, block)} - {block}:
            module = self.model.get_submodule(parent)
            hook = partial(parent_hook, parent=parent)
            hooks.enter_context(module.register_forward_hook(hook))

    def fill_outside(self) -> None:
        """Read what lies around the blocks: embeddings, the last norm, the head."""
        prefix = self.names[0].rpartition(".")[0] + "."
        materialize(
            self.model, "", self.model, self.artifact, self.dtype, self.device, skip=(prefix,)
        )
        tie(self.model)


def _parents(name: str, block: str) -> list[str]:
    """The modules around a layer, within its block."""
    parts = name.removeprefix(f"{block}.").split(".")
    return [".".join([block, *parts[:end]]) for end in range(1, len(parts))]


def _part(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    """A block's call, parted into the hidden states and all else."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def _shared(value: Any, path: tuple[Any, ...], pool: dict[Any, Tensor]) -> Any:
    """The same structure, its tensors those of an earlier batch where they are equal: masks and
    positions are the same for all windows of one length, and are kept once."""
    if isinstance(value, Tensor):
        known = pool.get(path)
        if known is not None and known.shape == value.shape and torch.equal(known, value):
            return known
        pool.setdefault(path, value)
        return value
    if isinstance(value, dict):
        return {key: _shared(item, (*path, key), pool) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_shared(item, (*path, i), pool) for i, item in enumerate(value))
    return value
