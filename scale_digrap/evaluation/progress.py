"""How far an evaluation is, over all ranks: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 30.0


class EvaluationProgress:
    """Shows one rank's view of all ranks' work; a context manager.

    Args:
        shown: False shows nothing.
        total: questions to answer.
        title: what is being evaluated.
        console: where to; standard error by default.
        every_s: seconds between two lines where the console is no terminal.
    """

    def __init__(
        self,
        shown: bool,
        total: int,
        title: str,
        *,
        console: Console | None = None,
        every_s: float = _LINE_EVERY_S,
    ) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._total, self._title, self._every_s = total, title, every_s
        self._shown = shown
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._told = time.monotonic()
        self._done = 0

    def __enter__(self) -> EvaluationProgress:
        self._began = self._told = time.monotonic()
        if self._shown and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("questions"),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None and self._task is not None:
                self._bar.update(self._task, completed=self._total)
            self._bar.stop()
        elif self._shown and kind is None:
            self._line(self._total)

    def update(self, done: int) -> None:
        """All ranks have answered so many."""
        if not self._shown or done == self._done:
            return
        self._done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._told >= self._every_s:
            self._told = time.monotonic()
            self._line(done)

    def _line(self, done: int) -> None:
        seconds = time.monotonic() - self._began
        speed = done / seconds if seconds else 0.0
        text = f"{self._title}: {done:,} of {self._total:,} questions, {speed:.1f} a second"
        if 0 < done < self._total:
            text += f", {timedelta(seconds=round((self._total - done) / speed))} left"
        self._console.print(text, markup=False)
