"""The live view of a compile: a bar for each step, and lines with scores, usage and calls in flight.

Screens are drawn by rich, but in own threads instead of rich's refresh thread: an interrupt, or a terminal
that accepts no output, must not leave a screen half drawn, end the compile or delay it.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator

from mpromptune.execution.attempts import Load
from mpromptune.execution.interrupts import deferred
from mpromptune.execution.limits import Budget
from mpromptune.show.closing import closing
from mpromptune.show.progress import Progress, Speed
from mpromptune.show.words import dollars, duration, rounded
from mpromptune.storage.findings import Findings

logger = logging.getLogger(__name__)

# NOTE: seconds that the end of a compile waits for the last frame; a stopped terminal (Ctrl-S) must not delay
# the result longer.
_LAST_FRAME = 5.0
# The steps of a compile by the titles of their bars.
LOADING, BOOTSTRAPPING, PROPOSING, SEARCHING = "Loading", "Bootstrapping", "Proposing", "Searching"
STEPS = LOADING, BOOTSTRAPPING, PROPOSING, SEARCHING


class Bar:
    """One step of a compile; any thread may advance it.

    Attributes:
        title: Its name.
        unit: Name of the units.
        earlier: Number of units that earlier runs have done.
        search: The last progress of the search, if this is its bar; it has the number done.
    """

    def __init__(
        self, title: str, total: int, unit: str, clock: Callable[[], float], earlier: int = 0
    ) -> None:
        self.title, self.unit, self.earlier = title, unit, earlier
        self.search: Progress | None = None
        self._total = total
        self._clock, self._began = clock, clock()
        self._ended: float | None = None
        self._lock, self._speed, self._done = threading.Lock(), Speed(clock), 0
        self._speed.note(0)

    def advance(self, number: int = 1) -> None:
        """Note that ``number`` more units are done."""
        with self._lock:
            self._done += number
            self._speed.note(self._done)

    def end(self) -> None:
        """End the step."""
        self._ended = self._clock() if self._ended is None else self._ended

    @property
    def ended(self) -> bool:
        """Whether the step has ended."""
        return self._ended is not None

    @property
    def done(self) -> int:
        """Number of units done."""
        return self._done if self.search is None else self.search.calls

    @property
    def total(self) -> int:
        """Number of units in the step, or of those done if earlier runs have done more."""
        return max(self._total, self.done)

    @property
    def seconds(self) -> float:
        """Seconds since the step began, until it ended."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the step ends; None if it is not known."""
        if self.search is not None:
            return self.search.seconds_left
        with self._lock:
            return self._speed.seconds_for(self.total - self._done)

    @property
    def percent(self) -> int:
        """Percentage done, rounded down."""
        return 100 * self.done // max(self.total, 1)

    @property
    def texts(self) -> tuple[str, str, str]:
        """The number done of the total, the time so far, and the time left if it is known."""
        left = None if self.ended else self.seconds_left
        remaining = "" if left is None else f"{duration(left)} left"
        return f"{self.done}/{self.total} {self.unit}", duration(self.seconds), remaining


class View:
    """The state of a compile to show, and the thread that shows it; its errors do not end the compile.

    Args:
        open_screen: Returns the screen, or None; called when the first step begins.
        budget: The usage and its limits.
        load: Returns the load of the steps before the search.
        clock: Returns the time in seconds.
        next_step: What to do after the compile; None for the lines of code that save its result.

    Attributes:
        bars: The steps that have begun.
        findings: The result, when there is one.
    """

    def __init__(
        self,
        open_screen: Callable[[], Screen | None],
        budget: Budget,
        load: Callable[[], Load],
        clock: Callable[[], float] = time.monotonic,
        next_step: str | None = None,
    ) -> None:
        self.bars: tuple[Bar, ...] = ()
        self.findings: Findings | None = None
        self._open_screen, self._budget, self._load, self._clock = open_screen, budget, load, clock
        self._next_step = next_step
        self._search: Progress | None = None
        self._news = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def bar(self, title: str, total: int, unit: str, earlier: int = 0) -> Bar:
        """Begin a step, which ends the earlier ones; the first one opens the view.

        Args:
            title: Its name, one of `STEPS`.
            total: Number of units in the step.
            unit: Name of the units.
            earlier: Number of units that earlier runs have done.
        """
        bar = Bar(title, total, unit, self._clock, earlier)
        for before in self.bars:
            before.end()
        self.bars = (*self.bars, bar)
        if self._thread is None:
            run = contextvars.copy_context().run  # a notebook's kernel finds the cell by this context
            with deferred():  # a thread whose start is interrupted cannot be joined
                self._thread = threading.Thread(
                    target=run, args=(self._run,), name="mpromptune-view", daemon=True
                )
                self._thread.start()
        self._news.set()
        return bar

    def on_progress(self, progress: Progress) -> None:
        """Receive the progress of the search, whose bar is the last one."""
        self._search = self.bars[-1].search = progress

    def close(self) -> None:
        """End all steps, and show the last frame."""
        for bar in self.bars:
            bar.end()
        self._closed = True
        self._news.set()
        if self._thread is not None:
            with deferred():
                self._thread.join(_LAST_FRAME)

    @property
    def ahead(self) -> tuple[str, ...]:
        """Titles of the steps after the present one."""
        last = self.bars[-1].title if self.bars else ""
        return () if self._closed or last not in STEPS else STEPS[STEPS.index(last) + 1 :]

    @property
    def summary(self) -> list[tuple[str, str]]:
        """Labelled lines at the end of a compile; empty before, and if it has no result."""
        if self.findings is None or not self._closed:
            return []
        seconds = sum(bar.seconds for bar in self.bars)
        return closing(self.findings, seconds, self._next_step, self._earlier)

    @property
    def status(self) -> list[str]:
        """Lines with scores, usage and calls in flight, as far as there are any."""
        load = self._load() if self._search is None else self._search.load
        before = f"including {self._earlier} program calls of earlier runs" if self._earlier else ""
        lines = [", ".join(_scores(self._search)), ", ".join(_expenses(self._budget)), before]
        return [line for line in (*lines, "" if self._closed else _concurrency(load)) if line]

    @property
    def _earlier(self) -> int:
        return sum(bar.earlier for bar in self.bars)

    def _run(self) -> None:
        try:
            screen = self._open_screen()
            if screen is not None:
                self._show_on(screen)
        except (Exception, SystemExit):
            logger.warning("The live view has ended; the compile continues.", exc_info=True)

    def _show_on(self, screen: Screen) -> None:
        try:
            while not self._closed:
                self._news.clear()
                screen.show(self)
                self._news.wait(screen.interval if not self._closed else 0)
        finally:
            screen.close(self)


def _scores(search: Progress | None) -> Iterator[str]:
    """Estimates while the search runs, shares in percent; at its end, `closing` has the scores."""
    if search is None or search.best is None:
        return
    if not search.finished:
        both = {"best": search.best, "baseline": search.baseline}
        known = {name: one for name, one in both.items() if one is not None}
        are_shares = all(0.0 <= one.measured <= 1.0 for one in known.values())
        estimates = [
            f"{name} {100 * one.mean:.1f} ± {100 * one.margin:.1f} %"
            if are_shares
            else f"{name} {one.mean:.4g} ± {one.margin:.4g}"
            for name, one in known.items()
        ]
        yield f"{', '.join(estimates)} (95 %)"
    yield f"{search.trials} trials"
    if search.proposals:
        yield f"{search.proposals} proposals"


def _expenses(budget: Budget) -> Iterator[str]:
    usage, limits = budget.usage.total, budget.limits
    yield f"{usage.lm_calls} LM calls"
    if usage.cache_hits:
        yield f"{usage.cache_hits} cache hits"
    if usage.tokens or limits.max_tokens:
        of = f" of {rounded(limits.max_tokens)}" if limits.max_tokens else ""
        yield f"{rounded(usage.tokens)}{of} tokens"
    if usage.cost or limits.max_cost:
        yield dollars(usage.cost) + (f" of {dollars(limits.max_cost)}" if limits.max_cost else "")


def _concurrency(load: Load) -> str:
    words = f"{load.running} of {load.most} calls in flight"
    if load.limit < load.most:
        words += f", {load.limit} allowed because of rate limits"
    if load.pause >= 1:
        words += f", pausing for {load.pause:.0f} s"
    if load.failed:
        words += f", {load.failed} failures since the last answer"
    return words


class Screen:
    """A place to show a view; only one thread calls it, and its errors end only the view.

    Attributes:
        interval: Seconds between frames.
    """

    interval = 1.0

    def show(self, view: View) -> None:
        """Show the present state; a screen replaces the last frame or writes new lines."""
        raise NotImplementedError

    def close(self, view: View) -> None:
        """Show the last frame, and release the screen."""
        self.show(view)
