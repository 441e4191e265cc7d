"""The live view of a compile: what its steps tell is shown by a thread of its own."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from mpromptune.execution.daemons import started
from mpromptune.execution.interrupts import deferred
from mpromptune.execution.limits import Budget
from mpromptune.execution.throttle import Load
from mpromptune.show.frames import BarFrame, Frame
from mpromptune.show.progress import Progress
from mpromptune.show.screens import Screen
from mpromptune.show.speed import Speed

logger = logging.getLogger(__name__)

# NOTE: seconds that the end of a compile waits for the last frame; a terminal that takes nothing (Ctrl-S)
# is not to hold up a result for longer.
_LAST_FRAME = 5.0


class Bar:
    """Counts what is done of one step; any thread may say so.

    Args:
        title: Names the step.
        total: So many are to be done.
        unit: Of what.
        clock: Says the time, in seconds.
    """

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float]) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._clock = clock
        self._lock = threading.Lock()
        self._speed = Speed(clock)
        self._began = clock()
        self._ended: float | None = None
        self._done = 0
        self._speed.note(0)

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            self._done += number
            self._speed.note(self._done)

    def end(self) -> None:
        """The step is over."""
        if self._ended is None:
            self._ended = self._clock()

    def frame(self, search: Progress | None = None) -> BarFrame:
        """How it stands; of a ``search``, as that has it."""
        with self._lock:
            done = self._done if search is None else search.calls
            left = self._speed.seconds_for(self._total - done) if search is None else search.seconds_left
        seconds = (self._clock() if self._ended is None else self._ended) - self._began
        return BarFrame(self._title, self._unit, done, self._total, seconds, left, self._ended is not None)


class View:
    """Bars below each other, and the state of the search; nothing that goes wrong here ends a compile.

    Only a thread of its own touches the screen: an interrupt cannot leave that halfway.

    Args:
        open_screen: Where to show it, or nowhere; asked when the first step begins.
        budget: What is used.
        load: The calls in flight before the search.
        clock: Says the time, in seconds.
    """

    def __init__(
        self,
        open_screen: Callable[[], Screen | None],
        budget: Budget,
        load: Callable[[], Load],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_screen = open_screen
        self._budget = budget
        self._load = load
        self._clock = clock
        self._bars: list[Bar] = []
        self._search: Progress | None = None
        self._news = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def bar(self, title: str, total: int, unit: str) -> Bar:
        """A bar below those of the steps before, which are over; the first one opens the view."""
        bar = Bar(title, total, unit, self._clock)
        for earlier in self._bars:
            earlier.end()
        self._bars = [*self._bars, bar]
        if self._thread is None:
            run = contextvars.copy_context().run  # in which a notebook's kernel finds the cell
            with deferred():  # a thread whose start is interrupted cannot be joined
                self._thread = started(partial(run, self._run), "mpromptune-view")
        self._news.set()
        return bar

    def on_progress(self, progress: Progress) -> None:
        """The search, whose bar is the last one, stands like this."""
        self._search = progress

    def close(self) -> None:
        """Leaves the last frame on the screen."""
        for bar in self._bars:
            bar.end()
        self._closed = True
        self._news.set()
        if self._thread is not None:
            with deferred():
                self._thread.join(_LAST_FRAME)

    def frame(self) -> Frame:
        """What there is to show now."""
        search, closed = self._search, self._closed
        *steps, last = self._bars
        bars = (*(bar.frame() for bar in steps), last.frame(search))
        load = self._load() if search is None else search.load
        return Frame(bars, self._budget.usage.total, self._budget.limits, load, search, closed)

    def _run(self) -> None:
        try:
            screen = self._open_screen()
            if screen is not None:
                self._show(screen)
        except (Exception, SystemExit):
            logger.warning("The live view has ended; the compile goes on.", exc_info=True)

    def _show(self, screen: Screen) -> None:
        try:
            while not self._closed:
                self._news.clear()
                screen.show(self.frame())
                self._news.wait(screen.interval if not self._closed else 0)
        finally:
            screen.close(self.frame())
