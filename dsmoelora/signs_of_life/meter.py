"""How far something is and how long it will take: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Meter:
    """Shows how much is done and the time left, in proportion to what was done since it was made.

    Args:
        console: where it goes; decides between bar and lines
        total: how much there is to do, in any unit
        done: how much was done before
        label: says the same to the reader, such as `step 3/10`
        seconds_between_lines: without a terminal, at most one line in this time
    """

    def __init__(
        self,
        console: Console,
        total: float,
        done: float = 0,
        label: str = "",
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        self._console, self._total, self._start, self._between = console, total, done, seconds_between_lines
        self._begin = time.monotonic()
        self._last_line: float | None = None
        self._bar: Progress | None = None
        if not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.fields[label]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=total, label=label)
        self._bar.update(self._task, completed=done)
        self._bar.start()

    def update(self, done: float, label: str, text: str = "") -> None:
        """More is done. Without a terminal the first and the last of these calls get a line in any case.

        Args:
            done: how much by now
            label: the same in words
            text: what else there is to say
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=done, label=label, description=text)
            return
        now = time.monotonic()
        if self._last_line is None or now - self._last_line >= self._between or done >= self._total:
            self._last_line = now
            left = (now - self._begin) / max(done - self._start, 1e-9) * (self._total - done)
            line = "  ".join(part for part in (label, text, f"{clock(left)} left") if part)
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """`2:05` for 125 seconds, `1:00:02` for an hour and two."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
