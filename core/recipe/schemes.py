"""Which schemes a method makes, which options it reads, which checkpoint format it writes."""

from typing import Any, Literal

Method = Literal[
    "rtn",
    "gptq",
    "awq",
    "smoothquant",
    "llm-int8",
    "nf4",
    "fp8",
    "autoround",
    "rotate",
    "qat",
]
Scheme = Literal[
    "W2A16",
    "W3A16",
    "W4A16",
    "W8A16",
    "W4A4-int4",
    "W4A8-int8",
    "W8A8-int8",
    "W8A8-fp8",
    "NF4",
    "mixed",
    "W16A16",
]
"""Bits of weights and of activations; W16A16 is a transform alone, written dense."""
Format = Literal["gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes"]

_WEIGHT_ONLY: tuple[Scheme, ...] = ("W2A16", "W3A16", "W4A16", "W8A16", "mixed")
_INTEGER: tuple[Scheme, ...] = (*_WEIGHT_ONLY, "W4A4-int4", "W4A8-int8", "W8A8-int8")
SCHEMES_OF: dict[Method, tuple[Scheme, ...]] = {
    "rtn": _INTEGER,
    "gptq": _INTEGER,
    "awq": _WEIGHT_ONLY,
    "smoothquant": ("W8A8-int8", "W4A8-int8", "W4A4-int4", "W16A16"),
    "llm-int8": ("W8A8-int8",),
    "nf4": ("NF4",),
    "fp8": ("W8A8-fp8",),
    "autoround": _WEIGHT_ONLY,
    "rotate": (*_INTEGER, "W16A16"),
    "qat": _WEIGHT_ONLY,
}
_DEFAULT_SCHEME: dict[Method, Scheme] = {
    "smoothquant": "W8A8-int8",
    "llm-int8": "W8A8-int8",
    "nf4": "NF4",
    "fp8": "W8A8-fp8",
}
BITS_OF: dict[Scheme, int] = {
    "W2A16": 2,
    "W3A16": 3,
    "W4A16": 4,
    "W8A16": 8,
    "W4A4-int4": 4,
    "W4A8-int8": 4,
    "W8A8-int8": 8,
    "W8A8-fp8": 8,
    "NF4": 4,
}
ROUNDING_OF: dict[Method, str] = {
    "rtn": "rtn",
    "gptq": "gptq",
    "awq": "rtn",
    "smoothquant": "gptq",
    "llm-int8": "rtn",
    "nf4": "nf4",
    "fp8": "fp8",
    "autoround": "autoround",
    "rotate": "gptq",
    "qat": "qat",
}
CHOOSING = frozenset({"awq", "smoothquant", "rotate"})
"""Methods after which weights may be rounded in another way (`rounding`)."""
_BY_METHOD: dict[str, frozenset[str]] = {
    "rounding": CHOOSING,
    "clip": frozenset({"awq"}),
    "alpha": frozenset({"smoothquant"}),
    "threshold": frozenset({"llm-int8"}),
    "double_quant": frozenset({"nf4"}),
    "fp8": frozenset({"fp8"}),
    "steps": frozenset({"qat"}),
    "learning_rate": frozenset({"qat"}),
}
_BY_ROUNDING: dict[str, frozenset[str]] = {
    "act_order": frozenset({"gptq"}),
    "damp_percent": frozenset({"gptq"}),
    "gptaq": frozenset({"gptq"}),
    "iterations": frozenset({"autoround"}),
    "true_sequential": frozenset({"gptq"}),
    "symmetric": frozenset({"rtn", "gptq", "autoround", "qat"}),
    "group_size": frozenset({"rtn", "gptq", "autoround", "qat"}),
    "grid": frozenset({"rtn", "gptq", "autoround", "qat"}),
}
_ROUNDS = frozenset({"rounding", "kv_cache", "format", *_BY_ROUNDING})
"""What only has a meaning where weights are rounded and stored."""


def default_scheme(method: Method, bits: int | None, *, mixed: bool) -> Scheme:
    """What a method makes of `bits` if no scheme was named; raises ValueError if it makes none."""
    if mixed:
        return "mixed"
    if bits is None:
        return _DEFAULT_SCHEME.get(method, "W4A16")
    fitting = [s for s in SCHEMES_OF[method] if BITS_OF.get(s) == bits]
    if not fitting:
        raise ValueError(f"method {method} makes {', '.join(SCHEMES_OF[method])}, not {bits} bits")
    return fitting[0]


def check_scheme(method: Method, scheme: Scheme, bits: int | None) -> None:
    """Raise ValueError where method, scheme and bits contradict each other."""
    if scheme not in SCHEMES_OF[method]:
        makers = [m for m, schemes in SCHEMES_OF.items() if scheme in schemes]
        raise ValueError(
            f"method {method} makes {', '.join(SCHEMES_OF[method])}; {scheme} is made by "
            + ", ".join(makers)
        )
    if bits is not None and BITS_OF.get(scheme) != bits:
        raise ValueError(f"scheme {scheme} contradicts bits {bits}")


def unread_option(
    method: Method, rounding: str, scheme: Scheme, changed: dict[str, Any]
) -> str | None:
    """Why one of the `changed` options (those off their defaults) would not be read; else None."""
    for option in changed:
        if option in _BY_METHOD and method not in _BY_METHOD[option]:
            readers = ", ".join(sorted(_BY_METHOD[option]))
            return f"{option} is read by method {readers} only, not by {method}"
        if option in _BY_ROUNDING and rounding not in _BY_ROUNDING[option]:
            readers = ", ".join(sorted(_BY_ROUNDING[option]))
            return f"{option} is read where weights are rounded by {readers}, not by {rounding}"
    if "gptaq" in changed and method in ("awq", "smoothquant"):
        return f"gptaq compares inputs with the original model's, and {method} scales them"
    if "kv_cache" in changed and method == "qat":
        return "kv_cache is not read by method qat; add its scales to a model that was not trained"
    if "clip" in changed and rounding != "rtn":
        return f"clip is read where weights are rounded by rtn, not by {rounding}"
    if "grid" in changed and method == "awq" and rounding == "rtn" and "clip" not in changed:
        return "grid is not read where awq searches the ranges: it goes with clip false"
    if "calibrate_all_experts" in changed and not _calibrates(method, rounding, scheme, changed):
        return f"calibrate_all_experts is not read by {method} in scheme {scheme}: it sees no text"
    if "offload" in changed and not _walks(method, rounding, scheme, changed):
        return f"offload is not read by {method} in scheme {scheme}: it sees no text"
    if {"gptaq", "calibrate_all_experts"} <= set(changed):
        return "gptaq compares inputs token by token: it goes with calibrate_all_experts"
    if "mixed_bits" in changed and scheme != "mixed":
        return "mixed_bits is read by scheme mixed only"
    if scheme in ("W8A8-int8", "W16A16") and (extra := sorted({"group_size"} & set(changed))):
        return f"{extra[0]} is not read by scheme {scheme}"
    if scheme == "W16A16" and (extra := sorted(_ROUNDS & set(changed))):
        return f"{extra[0]} is not read by scheme W16A16, which is written dense"
    if scheme in ("W4A4-int4", "W4A8-int8", "W8A8-int8") and changed.get("symmetric") is False:
        return f"scheme {scheme} has symmetric weights: symmetric cannot be false"
    return None


def _calibrates(method: Method, rounding: str, scheme: Scheme, changed: dict[str, Any]) -> bool:
    """Whether the inputs of layers are looked at."""
    if method in ("awq", "smoothquant") or changed.get("fp8") == "static":
        return True
    return rounding in ("gptq", "autoround", "qat") and scheme != "W16A16"


def _walks(method: Method, rounding: str, scheme: Scheme, changed: dict[str, Any]) -> bool:
    """Whether the text is run through the model block by block."""
    return "kv_cache" in changed or _calibrates(method, rounding, scheme, changed)


def default_format(method: Method, scheme: Scheme, options: dict[str, Any]) -> Format | None:
    """The checkpoint format that holds a scheme and that the most loaders read; None is dense."""
    if scheme == "W16A16":
        return None
    if method in ("llm-int8", "nf4") and not options.get("kv_cache"):
        return "bitsandbytes"
    if method == "fp8" and options.get("fp8") == "block" and not options.get("kv_cache"):
        return "fp8"
    if options.get("kv_cache") or scheme not in _WEIGHT_ONLY:
        return "compressed-tensors"
    return "awq" if method == "awq" and scheme == "W4A16" else "gptq"
