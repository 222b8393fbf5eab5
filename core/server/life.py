"""The server's life between its first answer and its last: signals, draining, sleep."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from infopt.core.server.doorway import House
from infopt.core.server.faults import shutting_down
from infopt.core.server.supervisor import Supervisor

_LOOK_S = 0.05
"""Between two looks at who is still inside."""
_NOBODY: Callable[[], None] = lambda: None  # noqa: E731


class Stop:
    """The first signal ends the loading, or asks the server to stop; the next one presses it."""

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self._task = task
        self._serving = False
        self._hangup = _NOBODY
        self.asked = asyncio.Event()
        self.pressed = asyncio.Event()

    def on_hangup(self, reload: Callable[[], None]) -> None:
        """The loading is over: from now on signals are asked, and SIGHUP reloads."""
        self._serving, self._hangup = True, reload

    def signal(self) -> None:
        if not self._serving:
            self._task.cancel()
        elif self.asked.is_set():
            self.pressed.set()
        self.asked.set()

    def hangup(self) -> None:
        self._hangup()


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Signals of this process, taken until the block is left."""
    task = asyncio.current_task()
    assert task is not None
    stop, loop = Stop(task), asyncio.get_running_loop()
    handlers = {
        signal.SIGINT: stop.signal,
        signal.SIGTERM: stop.signal,
        signal.SIGHUP: stop.hangup,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield stop
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


async def drained(house: House, seconds: float, stop: Stop) -> None:
    """Let nobody in, and wait for those inside; whoever is left then is told of the end."""
    house.draining = True
    deadline = time.monotonic() + seconds
    while house.working and time.monotonic() < deadline and not stop.pressed.is_set():
        await asyncio.sleep(_LOOK_S)
    for visit in list(house.visits):
        visit.end(shutting_down())


async def slumber(supervisor: Supervisor, house: House, after: float | None) -> None:
    """Send the engine to sleep whenever nobody asked for `after` seconds; None: never."""
    while after is not None:
        idle = 0.0 if house.working else time.monotonic() - house.last_left
        if idle >= after:
            supervisor.sleep()
            idle = 0.0
        await asyncio.sleep(max(_LOOK_S, after - idle))
