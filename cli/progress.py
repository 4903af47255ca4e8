"""Progress on stderr: bars for a person, one line per step for a log file."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from agentmem.cli.output import console, say


class Steps:
    """A bar over `total` steps (None: not known) and, below it, a bar of what the daemon is busy with."""

    def __init__(self, total: int | None = None) -> None:
        self._interactive = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console(stderr=True),
            transient=True,
            disable=not self._interactive,
        )
        self._steps = self._progress.add_task("", total=total)
        self._daemon: TaskID | None = None
        self._said = ""

    def step(self, text: str) -> None:
        """Say which step begins."""
        self._progress.update(self._steps, description=text)
        self._print(text)

    def done(self) -> None:
        """Count one step as finished."""
        self._progress.advance(self._steps)

    def daemon(self, fraction: float, text: str) -> None:
        """Show how far the daemon's own work is (0..1); the bar goes away when it is finished."""
        if self._daemon is None:
            self._daemon = self._progress.add_task("", total=1.0)
        self._progress.update(self._daemon, description=text, completed=fraction, visible=fraction < 1.0)
        self._print(text)

    def _print(self, text: str) -> None:
        if not self._interactive and text != self._said:
            say(text)
        self._said = text

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
