"""Where the live view is shown: a terminal, a notebook, or anything that takes lines of text."""

from __future__ import annotations

import html
import logging
import os
import sys
from dataclasses import replace
from typing import Any, Protocol, TextIO, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpromptune.show.frames import BarFrame, Frame

# NOTE: seconds between two lines of a step, at first; in a long run a twentieth of the time that it has
# taken, so that a night of it is some hundred lines, and a step that hangs is still noticed.
_LINE_EVERY, _LINE_SHARE = 30.0, 0.05
_Handler: TypeAlias = "logging.StreamHandler[TextIO]"

# What rich's FileProxy has: its `Live` puts one in the place of a stream that it draws on.
_PROXY = "rich_proxied_file"


class Screen(Protocol):
    """Shows frames; only one thread calls it, and what it raises ends the view and nothing else.

    Attributes:
        interval: Seconds from one frame to the next.
    """

    interval: float

    def show(self, frame: Frame) -> None:
        """Shows a frame instead of the one before, or after it."""

    def close(self, frame: Frame) -> None:
        """Shows the last frame, and leaves the screen to others."""


def choose() -> Screen | None:
    """What suits the place where this process writes to; None where there is nothing to write to.

    It is standard error, as for progress bars elsewhere: what a script prints can be piped on. A
    terminal that another live display of rich draws on is left to that.
    """
    stream, console = sys.stderr, _Console(stderr=True)
    if console.is_jupyter:
        return Notebook()
    if stream is None or any(hasattr(stream, _PROXY) for stream in (sys.stdout, sys.stderr)):
        return None
    is_dumb = os.environ.get("TERM", "dumb" if os.name == "posix" else "") == "dumb"
    return Lines(stream) if is_dumb or not _is_terminal(stream) else Terminal(console)


def _is_terminal(stream: TextIO | None) -> bool:
    """Not rich's word for it, which the environment can change: logs of CI would be full of escapes."""
    return stream is not None and stream.isatty()


class _Console(Console):
    """rich's, but for a broken pipe, which is no reason to exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise  # the error that is being handled


class Terminal:
    """Bars that move, and lines below them that change.

    Args:
        console: The terminal.
    """

    interval = 0.25

    def __init__(self, console: Console) -> None:
        # What is printed appears above the bars; what is printed into a file or a pipe stays there.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=_is_terminal(sys.stdout))

        self._moved: list[tuple[_Handler, TextIO, TextIO]] = []

    def show(self, frame: Frame) -> None:
        """Draws a frame in the place of the one before."""
        if not self._live.is_started:
            self._start()
        self._live.update(_drawn(frame), refresh=True)

    def close(self, frame: Frame) -> None:
        """Leaves the last frame where it is."""
        try:
            self.show(frame)
        finally:
            self._live.stop()
            for handler, old, new in self._moved:
                if handler.stream is new:
                    handler.setStream(old)

    def _start(self) -> None:
        """Takes the terminal, from log handlers too that hold on to the streams that there were."""
        before = sys.stdout, sys.stderr
        self._live.start()
        for old, new in zip(before, (sys.stdout, sys.stderr), strict=True):
            for handler in _handlers_on(old) if new is not old else ():
                handler.setStream(new)
                self._moved.append((handler, old, new))


def _handlers_on(stream: TextIO) -> list[_Handler]:
    """Log handlers that write to a stream: their lines would land in the middle of the bars."""
    known = list(logging.root.manager.loggerDict.values())
    loggers = [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream is stream]


def _drawn(frame: Frame) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, min_width=6)
    # The last column keeps its place until all is over, or the bars would change their length.
    for width in (0, 0, 0 if frame.ended else len("0:00:00 left")):
        grid.add_column(justify="right", no_wrap=True, min_width=width)
    for bar in frame.bars:
        style = "bar.finished" if bar.ended else "bar.complete"
        progress = ProgressBar(max(bar.total, 1), bar.done, complete_style=style)
        grid.add_row(Text(bar.title, "bold"), progress, bar.count, bar.elapsed, bar.left)
    lines = [Text(f"  {line}", "dim" if i else "") for i, line in enumerate(frame.status)]
    return Group(grid, *lines)


class Lines:
    """A line where a step begins and ends, and now and then in between.

    Args:
        stream: Gets the lines.
    """

    interval = 1.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._written: list[BarFrame] = []  # of each step, what was written last

    def show(self, frame: Frame) -> None:
        """Writes what is new, if it is time."""
        for number, bar in enumerate(frame.bars):
            if number == len(self._written):
                self._write(f"{bar.title}: {bar.total} {bar.unit}")
                self._written.append(replace(bar, done=0, seconds=0.0, ended=False))
            if _is_due(self._written[number], bar):
                self._write(_line(bar, frame))
                self._written[number] = bar

    def close(self, frame: Frame) -> None:
        """Writes how the last step ended."""
        self.show(frame)

    def _write(self, line: str) -> None:
        self._stream.write(f"mpromptune: {line}\n")
        self._stream.flush()


def _is_due(written: BarFrame, bar: BarFrame) -> bool:
    if written.ended or bar.ended:
        return not written.ended
    waited = bar.seconds - written.seconds
    return written.percent // 10 < bar.percent // 10 or waited >= max(_LINE_EVERY, _LINE_SHARE * bar.seconds)


def _line(bar: BarFrame, frame: Frame) -> str:
    times = f"after {bar.elapsed}" + (f", {bar.left}" if bar.left else "")
    return "; ".join([f"{bar.title} {bar.count} ({bar.percent} %) {times}", *frame.status])


class Notebook:
    """One output of the cell, replaced as the compile goes on; it needs IPython and nothing else."""

    interval = 1.0

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, frame: Frame) -> None:
        """Replaces the output."""
        from IPython.display import display

        content = {"text/html": _page(frame), "text/plain": _plain(frame)}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def close(self, frame: Frame) -> None:
        """Leaves the last frame in the notebook."""
        self.show(frame)


def _plain(frame: Frame) -> str:
    bars = [f"{bar.title} {bar.count}  {bar.elapsed}  {bar.left}".rstrip() for bar in frame.bars]
    return "\n".join([*bars, *frame.status])


def _page(frame: Frame) -> str:
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(bar.title)}</th>"
        f"<td><progress value='{bar.done}' max='{max(bar.total, 1)}' style='width:18em'></progress></td>"
        + "".join(
            f"<td style='text-align:right'>{html.escape(x)}</td>" for x in (bar.count, bar.elapsed, bar.left)
        )
        + "</tr>"
        for bar in frame.bars
    )
    lines = "".join(f"<div>{html.escape(line)}</div>" for line in frame.status)
    return f"<div style='font-variant-numeric:tabular-nums'><table>{rows}</table>{lines}</div>"
