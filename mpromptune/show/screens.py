"""Screens for the live view: terminals and notebooks, drawn by rich, or lines of text for logs.

The lines are own code because libraries draw bars, which cannot be read in a log.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO, TypeAlias

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpromptune.show.view import Screen, View

# NOTE: seconds between two lines of a step, or a twentieth of its time so far if that is longer. So a run of
# a night writes some hundred lines, and a step that hangs is still noticed.
_LINE_EVERY, _LINE_SHARE = 30.0, 0.05
# NOTE: as on a usual terminal; on small screens, a cell is narrower than the 115 columns that rich takes.
_NOTEBOOK_COLUMNS = 80
_Handler: TypeAlias = "logging.StreamHandler[TextIO]"


def choose() -> Screen | None:
    """The screen for the standard error of this process; None if there is none.

    Standard error is usual for progress bars, so that the standard output of a script can be piped. No screen
    is used on a terminal on which another live display of rich draws.
    """
    console = _Console(stderr=True)
    if console.is_jupyter:
        return Notebook()
    # The streams by which rich's `Live` replaces the standard ones have this attribute.
    if sys.stderr is None or any(hasattr(s, "rich_proxied_file") for s in (sys.stdout, sys.stderr)):
        return None
    # Not rich's `is_terminal`, which the environment can set, so that logs of CI would be full of escapes.
    is_dumb = os.environ.get("TERM", "dumb" if os.name == "posix" else "") == "dumb"
    return Lines(sys.stderr) if is_dumb or not sys.stderr.isatty() else Terminal(console)


class _Console(Console):
    """rich's console, which does not exit on a broken pipe."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise  # the error that is being handled


class Terminal(Screen):
    """Moving bars, and changing lines below them."""

    interval = 0.25

    def __init__(self, console: Console) -> None:
        # Printed text appears above the bars, unless standard output is a file or a pipe.
        prints_here = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=prints_here)
        self._moved: list[tuple[_Handler, TextIO, TextIO]] = []

    def show(self, view: View) -> None:
        """Replace the last frame."""
        if not self._live.is_started:
            self._start()
        self._live.update(_drawn(view), refresh=True)

    def close(self, view: View) -> None:
        """Draw the last frame, and leave it on the terminal."""
        try:
            self.show(view)
        finally:
            self._live.stop()
            for handler, old, new in self._moved:
                if handler.stream is new:
                    handler.setStream(old)

    def _start(self) -> None:
        """Start the live display, and redirect log handlers, whose lines would appear between the bars."""
        before = sys.stdout, sys.stderr
        self._live.start()
        proxies = dict(zip(before, (sys.stdout, sys.stderr), strict=True))
        known = (logging.root, *logging.root.manager.loggerDict.values())
        for handler in (h for log in known if isinstance(log, logging.Logger) for h in log.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream in proxies:
                self._moved.append((handler, handler.stream, proxies[handler.stream]))
                handler.setStream(proxies[handler.stream])


class Notebook(Screen):
    """One output of the cell, which is replaced by each frame; needs only IPython."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, view: View) -> None:
        """Replace the output."""
        from IPython.display import display

        drawn = _drawn(view)
        drawn.width = _NOTEBOOK_COLUMNS
        if self._handle is None:
            self._handle = display(drawn, display_id=True)
        else:
            self._handle.update(drawn)


def _drawn(view: View) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, min_width=6)
    # The last column keeps its width until the end, so that the bars do not change their length.
    for width in (0, 0, 0 if all(bar.ended for bar in view.bars) else len("0:00:00 left")):
        grid.add_column(justify="right", no_wrap=True, min_width=width)
    for bar in view.bars:
        style = "bar.finished" if bar.ended else "bar.complete"
        drawn = ProgressBar(max(bar.total, 1), bar.done, complete_style=style)
        grid.add_row(Text(bar.title, "bold"), drawn, *map(Text, bar.texts))
    for title in view.ahead:
        grid.add_row(Text(title, "dim"))
    whole = Table.grid(expand=True)
    whole.add_row(grid)
    if summary := view.summary:
        whole.add_row(_labelled(summary))
    else:
        for number, line in enumerate(view.status):
            whole.add_row(Text(f"  {line}", "dim" if number else ""))
    return whole


def _labelled(lines: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=max(len(label) for label, _ in lines))
    grid.add_column()  # wider lines are wrapped, so that commands can be copied
    for label, text in lines:
        grid.add_row(Text(label, "bold"), Text(text))
    return grid


class Lines(Screen):
    """A line when a step begins or ends, and at intervals in between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._written: list[tuple[int, float, bool]] = []  # percent, seconds and end of each step's last line

    def show(self, view: View) -> None:
        """Write the lines that are due."""
        for number, bar in enumerate(view.bars):
            if number == len(self._written):
                self._write(f"{bar.title}: {bar.total} {bar.unit}")
                self._written.append((0, 0.0, False))
            percent, seconds, ended = bar.percent, bar.seconds, bar.ended
            if _is_due(percent, seconds, ended, *self._written[number]):
                count, elapsed, left = bar.texts
                times = f"after {elapsed}, {left}" if left else f"after {elapsed}"
                self._write("; ".join([f"{bar.title} {count} ({percent} %) {times}", *view.status]))
                self._written[number] = percent, seconds, ended

    def close(self, view: View) -> None:
        """Write the last lines, and the summary."""
        self.show(view)
        for label, text in view.summary:
            self._write(f"{label}: {text}")

    def _write(self, line: str) -> None:
        # A file of the user's may lack arrows and quotation marks; standard error itself never does.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(f"mpromptune: {line}\n".encode(encoding, "backslashreplace").decode(encoding))
        self._stream.flush()


def _is_due(percent: int, seconds: float, ended: bool, before: int, at: float, was_ended: bool) -> bool:
    if ended or was_ended:
        return not was_ended
    return before // 10 < percent // 10 or seconds - at >= max(_LINE_EVERY, _LINE_SHARE * seconds)
