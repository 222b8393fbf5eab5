"""Work on a GPU without the time of its launches: recorded once, replayed as one."""

from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]


def captured(works: Sequence[Work], device: torch.device) -> Work:
    """All of the works, one after the other, done when the call returns.

    On a GPU they are a CUDA graph: a kernel of a few microseconds takes less time than Python takes
    to launch it. They are run once before, so that whatever they compile is compiled.
    """
    for work in works:
        work()
    if device.type != "cuda":
        return lambda: [work() for work in works]
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [work() for work in works]

    def replay() -> object:
        graph.replay()
        torch.cuda.synchronize(device)
        return kept  # results lie in the graph's own memory

    return replay
