"""A layer of experts with a linear layer for each projection of each expert.

transformers 5 fuses experts into tensors [experts, ...]; who works layer by layer needs them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Calibration = Literal["all", "routed"]
_JOINED = ("gate_proj", "up_proj")
_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class FusedPart:
    """Which part of the fused tensor `name` is an expert's own; `half`: gate 0, up 1, or all."""

    name: str
    expert: int
    half: int | None
    interleaved: bool
    transposed: bool

    def cut(self, fused: Tensor) -> Tensor:
        """The expert's weight [outputs, inputs], or bias [outputs]."""
        own = fused[self.expert]
        if self.transposed and own.ndim == 2:
            own = own.T
        if self.half is not None:
            size = len(own) // 2
            own = own[self.half :: 2] if self.interleaved else own[self.half * size :][:size]
        return own.contiguous()


class Expert(nn.Module):
    """down(activate(gate and up)), or down(activate(up)) where there is no gate."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        activate: Callable[[Tensor], Tensor],
        *,
        gated: bool,
        interleaved: bool,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        """sizes: inputs, inner columns, outputs; `activate` takes gate and up as they are fused."""
        super().__init__()
        inputs, inner, outputs = sizes
        if gated:
            self.gate_proj = nn.Linear(inputs, inner, bias, device=_META, dtype=dtype)
        self.up_proj = nn.Linear(inputs, inner, bias, device=_META, dtype=dtype)
        self.down_proj = nn.Linear(inner, outputs, bias, device=_META, dtype=dtype)
        self.gated, self.interleaved, self.activate = gated, interleaved, activate

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return cast(Tensor, self.down_proj(self.activate(self.up_proj(x))))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.interleaved:
            joined = torch.stack((gate, up), dim=-1).flatten(-2)
        else:
            joined = torch.cat((gate, up), dim=-1)
        return cast(Tensor, self.down_proj(self.activate(joined)))


class Experts(nn.Module):
    """Experts '0', '1', ...; each token's result is that of the experts it is routed to.

    `calibration` is None in use. A calibration sets it: 'all' shows every token to every expert,
    'routed' to its own; then an expert without tokens is called with none, so that whoever
    watches its layers sees them in their order.
    """

    calibration: Calibration | None = None

    def __init__(self, fused: nn.Module) -> None:
        """Of a fused module on the meta device, whose parameters are given up."""
        super().__init__()
        first = _first_projection(fused)
        down = cast(Tensor, fused._parameters["down_proj"])
        self.num_experts = first.shape[0]
        self.gated = "gate_up_proj" in fused._parameters
        self.transposed = bool(getattr(fused, "is_transposed", False))
        self.interleaved = not getattr(fused, "is_concatenated", True)
        bias = "down_proj_bias" in fused._parameters
        inner, outputs = down.shape[1:] if self.transposed else (down.shape[2], down.shape[1])
        inputs = first.shape[1] if self.transposed else first.shape[2]
        # Not as a module of its own: it has no weights, and every expert would seem to own it.
        activate = partial(
            cast(Callable[..., Any], fused._apply_gate if self.gated else fused.act_fn)
        )
        fused._parameters.clear()  # the activation keeps the module, not its weights
        for index in range(self.num_experts):
            expert = Expert(
                (inputs, inner, outputs),
                activate,
                gated=self.gated,
                interleaved=self.interleaved,
                bias=bias,
                dtype=first.dtype,
            )
            self.add_module(str(index), expert)
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, inputs], and of each token's experts [T, k] numbers and weights -> [T, outputs].

        The sum over the experts is taken as transformers' grouped products take it.
        """
        tokens, width = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        results = hidden_states.new_zeros(len(chosen), self.outputs)
        for index in range(self.num_experts):
            places = (chosen == index).nonzero().squeeze(-1)
            rows = places // width
            if self.calibration == "all":
                results[places] = self.expert(index)(hidden_states)[rows]
            elif len(places) or self.calibration == "routed":
                results[places] = self.expert(index)(hidden_states[rows])
        weighted = results * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, width, -1).sum(dim=1).to(hidden_states.dtype)

    def expert(self, index: int) -> Expert:
        return cast(Expert, self._modules[str(index)])

    def fused_part(self, local: str) -> FusedPart:
        """Where a fused checkpoint holds the parameter `local`, such as '3.gate_proj.weight'."""
        number, projection, kind = local.split(".")
        joined = self.gated and projection in _JOINED
        name = ("gate_up_proj" if joined else projection) + ("_bias" if kind == "bias" else "")
        half = _JOINED.index(projection) if joined else None
        return FusedPart(name, int(number), half, self.interleaved, self.transposed)

    @property
    def fused_names(self) -> frozenset[str]:
        """The fused tensors, by their names within this module."""
        own = self.expert(0).named_parameters()
        return frozenset(self.fused_part(f"0.{name}").name for name, _ in own)


def unfuse(model: nn.Module) -> None:
    """Replace every fused layer of experts of a model on the meta device by Experts."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Experts(module).train(module.training))


def calibrate_experts(model: nn.Module, calibration: Calibration | None) -> None:
    """Set which tokens the experts of a model see while it is calibrated; None ends that."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.calibration = calibration


def experts_around(model: nn.Module, parameter: str) -> tuple[str, Experts] | None:
    """The layer of experts that a parameter's full name lies in, and that layer's name."""
    owner = parameter.rsplit(".", 3)[0]
    module = model.get_submodule(owner)
    return (owner, module) if isinstance(module, Experts) else None


def _first_projection(fused: nn.Module) -> Tensor:
    parameters = fused._parameters
    return cast(Tensor, parameters.get("gate_up_proj", parameters.get("up_proj")))


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds nothing but experts as transformers lays them out for its kernels.

    `has_gate` is what it notes on such a module; its forward pass is then the one that all share.
    """
    gate = getattr(module, "has_gate", None)
    if gate is None or not hasattr(module, "_apply_gate" if gate else "act_fn"):
        return False
    first = "gate_up_proj" if gate else "up_proj"
    expected = {first, "down_proj"}
    if getattr(module, "has_bias", False):
        expected |= {f"{name}_bias" for name in expected}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if set(shapes) != expected or any(len(shapes[n]) != 3 for n in (first, "down_proj")):
        return False
    wide, down = shapes[first], shapes["down_proj"]
    if not getattr(module, "is_transposed", False):
        wide, down = (wide[0], wide[2], wide[1]), (down[0], down[2], down[1])
    return wide[0] == down[0] and wide[2] == (2 if gate else 1) * down[1]
