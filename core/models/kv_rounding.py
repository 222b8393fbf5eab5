"""Keys and values of a transformers model rounded to the format of an 8-bit cache.

It is done where an attention module hands new keys and values to its cache, by a stand-in that the
module is given for it: so it holds with a cache, without one, and for a block that runs alone.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from infopt.core.artifact.quantized import kv_format
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.scheme import KvFormat

KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"

OnUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Is handed new keys and values [batch, heads, length, head_dim]; returns those to be cached."""

# What transformers calls the cache among the arguments of a forward pass.
_PARAMETERS = ("past_key_values", "layer_past", "past_key_value")


def kv_number_format(form: KvFormat) -> ActivationFormat:
    """One static scale for the keys of a layer and one for its values, as compressed-tensors."""
    match form:
        case "int8":
            return ActivationFormat("int", 8, "tensor", dynamic=False)
        case "fp8":
            return ActivationFormat("float", 8, "tensor", dynamic=False)


def round_kv(
    model: nn.Module, scales: Mapping[str, Tensor], form: KvFormat
) -> list[RemovableHandle]:
    """Let the attention modules of `model` see keys and values as the cache would give them back.

    scales: `<attention module>.k_scale` and `.v_scale`, each [1], by the names that `model` has.
    """
    return [
        on_update(model.get_submodule(name), _rounding(scales, name, form))
        for name in sorted({name.rpartition(".")[0] for name in scales})
    ]


def round_kv_as_stored(model: nn.Module, artifact: Artifact) -> None:
    """Round keys and values of `model` as the artifact's KV cache scheme says, if it has one.

    Raises ArtifactError where scales are missing, UnsupportedError where they are of no module.
    """
    form = kv_format(artifact)
    if form is None:
        return
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    scales: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        stored = next(
            (n for n in (name, name.removeprefix(prefix)) if artifact.has(f"{n}.{KEY_SCALE}")), None
        )
        if stored is not None and cache_parameter(module) is not None:
            for kind in (KEY_SCALE, VALUE_SCALE):
                scales[f"{name}.{kind}"] = artifact.tensor(f"{stored}.{kind}")
            used.add(f"{stored}.{KEY_SCALE}")
    if not scales:
        raise ArtifactError(f"{artifact.path} says that its KV cache is {form}, but has no scales")
    strays = [n for n in artifact.names() if n.endswith(f".{KEY_SCALE}") and n not in used]
    if strays:
        raise UnsupportedError(
            f"{artifact.path} has {strays[0]}, but transformers has no such module with a cache"
        )
    round_kv(model, scales, form)


def on_update(module: nn.Module, update: OnUpdate) -> RemovableHandle:
    """Let `update` change what the attention `module` hands to its cache.

    Only the innermost of modules that hand a cache on to one another is heard.
    Raises UnsupportedError where the module's forward takes no cache.
    """
    parameter = cache_parameter(module)
    if parameter is None:
        raise UnsupportedError(f"the forward pass of {type(module).__name__} takes no KV cache")
    signature = inspect.signature(module.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        cache = bound.arguments.get(parameter)
        if isinstance(cache, _StandIn):
            cache = cache.inner
        # Without a cache the model reads no past: an empty one gives back what it is handed.
        inner = DynamicCache() if cache is None else cache
        bound.arguments[parameter] = _StandIn(inner, update)
        return bound.args, bound.kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def cache_parameter(module: nn.Module) -> str | None:
    """By what name the module's forward pass takes a KV cache, if it does."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in _PARAMETERS if name in names), None)


class _StandIn:
    """A cache to all who ask, whose updates pass through `update` first."""

    def __init__(self, inner: Any, update: OnUpdate) -> None:
        self.inner = inner
        self._update = update

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner.update(*self._update(keys, values), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _rounding(scales: Mapping[str, Tensor], name: str, form: KvFormat) -> OnUpdate:
    number_format = kv_number_format(form)
    pair = (scales[f"{name}.{KEY_SCALE}"], scales[f"{name}.{VALUE_SCALE}"])
    held: dict[Any, tuple[Tensor, Tensor]] = {}

    def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if keys.device not in held:
            held[keys.device] = (pair[0].to(keys.device), pair[1].to(keys.device))
        key_scale, value_scale = held[keys.device]
        return (
            round_inputs(keys, number_format, key_scale),
            round_inputs(values, number_format, value_scale),
        )

    return update
