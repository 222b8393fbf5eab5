"""Memory over time, sampled beside the work."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

_EVERY = 0.01
_KEPT = 400


class MemorySampler:
    """A thread that notes (seconds, bytes) every 10 ms, as a context around the work."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._samples: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._samples.append((time.perf_counter() - self._began, self._read()))
            if self._done.wait(_EVERY):
                break

    @property
    def peak(self) -> int:
        return max(bytes_ for _, bytes_ in self._samples)

    @property
    def timeline(self) -> tuple[tuple[float, int], ...]:
        """At most a few hundred of them: of each stretch the highest."""
        stride = max(1, -(-len(self._samples) // _KEPT))
        stretches = (
            self._samples[start : start + stride] for start in range(0, len(self._samples), stride)
        )
        return tuple(max(stretch, key=lambda sample: sample[1]) for stretch in stretches)


def memory_reader(device: str) -> Callable[[], int]:
    """Bytes that this process holds on 'cpu' (resident), or that torch holds on 'cuda'."""
    if device == "cuda":
        import torch

        return lambda: int(torch.cuda.memory_reserved())
    import psutil

    process = psutil.Process()
    return lambda: int(process.memory_info().rss)
