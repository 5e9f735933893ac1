"""The one door to progress display: silent unless someone asks for it.

Long work calls :func:`track`. Nothing is shown until :func:`show` is active, which the command
line does; a library user writes ``with moecollab.progress.show(): ...``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar(Protocol):
    """What long work may say: how far it is and one short remark."""

    def advance(self, steps: float = 1) -> None:
        """Moves on by some steps."""

    def remark(self, text: str) -> None:
        """Shows a short text behind the bar."""


class _Silent:
    def advance(self, steps: float = 1) -> None:
        """Shows nothing."""

    def remark(self, text: str) -> None:
        """Shows nothing."""


class _Display(Protocol):
    def open(self, what: str, total: float | None) -> Bar: ...

    def close(self, bar: Bar) -> None: ...

    def say(self, text: str) -> None: ...


_display: ContextVar[_Display | None] = ContextVar("moecollab_progress", default=None)


@contextmanager
def track(what: str, total: float | None = None) -> Iterator[Bar]:
    """A bar for one piece of work of `total` steps (unknown if None)."""
    display = _display.get()
    if display is None:
        yield _Silent()
        return
    bar = display.open(what, total)
    try:
        yield bar
    finally:
        display.close(bar)


def say(text: str) -> None:
    """One line that stays in view, such as what long work is going to need."""
    display = _display.get()
    if display is not None:
        display.say(text)


class _RichBar:
    def __init__(self, bars: Progress, what: str, total: float | None) -> None:
        self.bars = bars
        self.task = bars.add_task(what, total=total, remark="")

    def advance(self, steps: float = 1) -> None:
        self.bars.advance(self.task, steps)

    def remark(self, text: str) -> None:
        self.bars.update(self.task, remark=text)


@contextmanager
def show() -> Iterator[None]:
    """Shows the progress of everything done inside, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
        console=Console(stderr=True),
    )

    class RichDisplay:
        def __init__(self) -> None:
            self.depth = 0
            self.said: set[str] = set()

        def open(self, what: str, total: float | None) -> Bar:
            bars.start()
            self.depth += 1
            return _RichBar(bars, what, total)

        def close(self, bar: Bar) -> None:
            self.depth -= 1
            if isinstance(bar, _RichBar) and self.depth:
                bars.remove_task(bar.task)  # a part of other work: only the whole stays in view
            elif isinstance(bar, _RichBar):
                bars.stop_task(bar.task)

        def say(self, text: str) -> None:
            if text in self.said:  # work in rounds says the same in every one
                return
            self.said.add(text)
            bars.console.print(text, highlight=False, markup=False)

    token = _display.set(RichDisplay())
    try:
        yield
    finally:
        _display.reset(token)
        if bars.live.is_started:
            bars.stop()
