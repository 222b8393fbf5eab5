"""When the requests of an open loop are due: seconds from its start, without end, seeded."""

import random
from collections.abc import Iterator

from infopt.core.recipe.bench import Arrival


def arrivals(
    kind: Arrival, rate: float, *, seed: str, burstiness: float | None = None
) -> Iterator[float]:
    """Times of a renewal process of `rate` a second; the first is at 0 when they are constant.

    Gamma gaps have the shape `burstiness` and the mean 1 / rate: their coefficient of variation is
    1 / sqrt(burstiness).
    """
    rng = random.Random(seed)
    if kind == "constant":
        count = 0
        while True:
            yield count / rate
            count += 1
    time = 0.0
    while True:
        if kind == "gamma":
            assert burstiness is not None, "checked by the settings"
            time += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        else:
            time += rng.expovariate(rate)
        yield time
