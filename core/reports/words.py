"""Numbers as people read them."""

import math


def size(count: float) -> str:
    """Bytes in decimal units: '269 MB'."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return (
                f"{count / scale:.3g} {unit}"
                if count / scale < 100
                else f"{count / scale:.0f} {unit}"
            )
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds in the unit that reads best."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.1f} min"


def number(value: float | None, form: str = ".4g") -> str:
    """A number in the given form; a dash where there is none, the word where it is not finite."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return format(value, form)
