"""The screen: the only place that prints.

The report goes to standard output; progress, notes and errors go to standard error.
With `--json -` standard output holds the JSON alone, and the summary moves to standard error.
"""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from infopt.core.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PLAIN_WIDTH = 110
_PLAIN_INTERVAL_S = 10.0


def plain_error(message: str) -> None:
    """One line on standard error."""
    print(f"infopt: error: {' '.join(message.split())}", file=sys.stderr)


def plain_line(text: str) -> None:
    """One line on standard output."""
    print(text)


class Screen:
    """What one command shows."""

    def __init__(self, *, quiet: bool = False, json_on_stdout: bool = False) -> None:
        self.quiet = quiet
        self._err = _console(stderr=True)
        self._out = self._err if json_on_stdout else _console(stderr=False)
        self._progress = (
            _RichProgress(self._err) if self._err.is_terminal else _LineProgress(self._err)
        )

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.close()

    def progress(self, progress: Progress) -> None:
        """The callback that core is handed; a stage named 'warning' is one."""
        if progress.stage == "warning":
            self.warn(progress.note)
        elif not self.quiet:
            self._progress.show(progress)

    def summary(self, content: "RenderableType") -> None:
        """The human form of a report."""
        self._progress.close()
        if not self.quiet:
            self._out.print(content)

    def note(self, text: str) -> None:
        """A line beside the report, on standard error."""
        self._progress.close()
        if not self.quiet:
            self._err.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning: shown even when quiet."""
        self._progress.close()
        self._err.print(f"infopt: warning: {text}", highlight=False, markup=False, soft_wrap=True)

    def json(self, text: str) -> None:
        """The report, on standard output, alone."""
        self._progress.close()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PLAIN_WIDTH)


class _LineProgress:
    """Readable without a terminal: a line when a stage begins, then one every ten seconds."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._stage = ""
        self._began = self._shown = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        ended = progress.total is not None and progress.done >= progress.total
        if progress.stage != self._stage:
            self._stage, self._began, self._shown = progress.stage, now, -_PLAIN_INTERVAL_S
        if now - self._shown < _PLAIN_INTERVAL_S and not (ended and progress.total):
            return
        self._shown = now
        parts = [progress.stage]
        if progress.total:
            parts.append(f"{progress.done}/{progress.total}{_eta(progress, now - self._began)}")
        if progress.note:
            parts.append(progress.note)
        self._console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._stage = ""


class _RichProgress:
    """A live bar with the time that is left."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, tuple[int, float]] = {}
        self._live = False

    def show(self, progress: Progress) -> None:
        from rich.progress import TaskID

        if not self._live:
            self._bar.start()
            self._live = True
        if progress.stage not in self._tasks:
            task = self._bar.add_task(progress.stage, total=progress.total, note="")
            self._tasks[progress.stage] = (int(task), time.monotonic())
        task_id, began = self._tasks[progress.stage]
        eta = _eta(progress, time.monotonic() - began).strip(" ,")
        note = "  ".join(part for part in (eta, progress.note) if part)
        self._bar.update(TaskID(task_id), completed=progress.done, total=progress.total, note=note)

    def close(self) -> None:
        if self._live:
            self._bar.stop()
            self._live = False


def _eta(progress: Progress, elapsed: float) -> str:
    """What is left at the speed of this run; resumed units say nothing about it."""
    done = progress.done - progress.resumed
    if not progress.total or done <= 0 or progress.done >= progress.total:
        return ""
    return f", {clock(elapsed / done * (progress.total - progress.done))} left"


def clock(seconds: float) -> str:
    """'45 s', '3 min 20 s', '1 h 5 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
