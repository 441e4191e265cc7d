"""The live view of a compile: a bar for each step, and below them scores, expenses and calls in flight.

Screens are drawn by rich, but not by its own refresh thread: neither an interrupt nor a terminal that accepts
nothing may leave one half drawn, end a compile or hold it up.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.filesize import pick_unit_and_suffix

from mpromptune.execution.attempts import Load
from mpromptune.execution.interrupts import deferred
from mpromptune.execution.limits import Budget
from mpromptune.show.progress import Progress, Speed, Standing

logger = logging.getLogger(__name__)

# NOTE: seconds that the end of a compile waits for the last frame; a terminal that is stopped (Ctrl-S) must
# not hold up a result for longer.
_LAST_FRAME = 5.0


class Bar:
    """One step of a compile; any thread may advance it.

    Attributes:
        title: Its name.
        total: How many are to be done.
        unit: What is counted.
        search: The last report of the search, which then says what is done.
    """

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float]) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.search: Progress | None = None
        self._clock, self._began = clock, clock()
        self._ended: float | None = None
        self._lock, self._speed, self._done = threading.Lock(), Speed(clock), 0
        self._speed.note(0)

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            self._done += number
            self._speed.note(self._done)

    def end(self) -> None:
        """The step is over."""
        self._ended = self._clock() if self._ended is None else self._ended

    @property
    def ended(self) -> bool:
        """Whether the step is over."""
        return self._ended is not None

    @property
    def done(self) -> int:
        """How many are done."""
        return self._done if self.search is None else self.search.calls

    @property
    def seconds(self) -> float:
        """Since the step began, until it ended."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def seconds_left(self) -> float | None:
        """Until the step ends; None where that is not known."""
        if self.search is not None:
            return self.search.seconds_left
        with self._lock:
            return self._speed.seconds_for(self.total - self._done)

    @property
    def percent(self) -> int:
        """What is done, rounded down."""
        return 100 * self.done // max(self.total, 1)

    @property
    def texts(self) -> tuple[str, str, str]:
        """What is done of what, the time it has taken, and the time left as far as that is known."""
        left = None if self.ended else self.seconds_left
        remaining = "" if left is None else f"{_duration(left)} left"
        return f"{self.done}/{self.total} {self.unit}", _duration(self.seconds), remaining


class View:
    """What there is to see of a compile, and the thread that shows it; no error of it ends a compile.

    Args:
        open_screen: Where to show it, or nowhere; called when the first step begins.
        budget: What is used.
        load: The calls in flight before the search.
        clock: Says the time, in seconds.

    Attributes:
        bars: The steps that have begun.
    """

    def __init__(
        self,
        open_screen: Callable[[], Screen | None],
        budget: Budget,
        load: Callable[[], Load],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bars: tuple[Bar, ...] = ()
        self._open_screen, self._budget, self._load, self._clock = open_screen, budget, load, clock
        self._search: Progress | None = None
        self._news = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def bar(self, title: str, total: int, unit: str) -> Bar:
        """Begins a step, which ends those before; the first one opens the view."""
        bar = Bar(title, total, unit, self._clock)
        for earlier in self.bars:
            earlier.end()
        self.bars = (*self.bars, bar)
        if self._thread is None:
            run = contextvars.copy_context().run  # in which a notebook's kernel finds the cell
            with deferred():  # a thread whose start is interrupted cannot be joined
                self._thread = threading.Thread(
                    target=run, args=(self._run,), name="mpromptune-view", daemon=True
                )
                self._thread.start()
        self._news.set()
        return bar

    def on_progress(self, progress: Progress) -> None:
        """Takes a report of the search, whose bar is the last one."""
        self._search = self.bars[-1].search = progress

    def close(self) -> None:
        """Leaves the last frame on the screen."""
        for bar in self.bars:
            bar.end()
        self._closed = True
        self._news.set()
        if self._thread is not None:
            with deferred():
                self._thread.join(_LAST_FRAME)

    @property
    def status(self) -> list[str]:
        """A line each of scores, expenses, and calls in flight; those that there is something to say of."""
        load = self._load() if self._search is None else self._search.load
        lines = [", ".join(_scores(self._search)), ", ".join(_expenses(self._budget))]
        return [line for line in (*lines, "" if self._closed else _concurrency(load)) if line]

    def _run(self) -> None:
        try:
            screen = self._open_screen()
            if screen is not None:
                self._show_on(screen)
        except (Exception, SystemExit):
            logger.warning("The live view has ended; the compile goes on.", exc_info=True)

    def _show_on(self, screen: Screen) -> None:
        try:
            while not self._closed:
                self._news.clear()
                screen.show(self)
                self._news.wait(screen.interval if not self._closed else 0)
        finally:
            screen.close(self)


def _scores(search: Progress | None) -> Iterator[str]:
    """In percent, as DSPy has them: estimates while the search runs, at its end what was measured."""
    if search is None or search.best is None:
        return
    best, baseline = search.best, search.baseline
    if search.finished:
        yield f"best {_measured(best, search.n_examples)}"
        if baseline is not None:
            yield f"baseline {_measured(baseline, search.n_examples)}"
    else:
        yield f"best {100 * best.mean:.1f} ± {100 * best.margin:.1f} % (95 % interval)"
        if baseline is not None:
            yield f"baseline {100 * baseline.mean:.1f} %"
    yield f"{search.trials} trials"


def _measured(standing: Standing, n_examples: int) -> str:
    score = f"{100 * standing.measured:.2f} %"
    return score if standing.examples == n_examples else f"{score} on {standing.examples} examples"


def _expenses(budget: Budget) -> Iterator[str]:
    usage, limits = budget.usage.total, budget.limits
    yield f"{usage.lm_calls} LM calls"
    if usage.cache_hits:
        yield f"{usage.cache_hits} cache hits"
    if usage.tokens or limits.max_tokens:
        of = f" of {_rounded(limits.max_tokens)}" if limits.max_tokens else ""
        yield f"{_rounded(usage.tokens)}{of} tokens"
    if usage.cost or limits.max_cost:
        yield _dollars(usage.cost) + (f" of {_dollars(limits.max_cost)}" if limits.max_cost else "")


def _concurrency(load: Load) -> str:
    words = f"{load.running} of {load.most} calls in flight"
    if load.limit < load.most:
        words += f", {load.limit} allowed because of rate limits"
    if load.pause >= 1:
        words += f", pausing for {load.pause:.0f} s"
    return words


def _rounded(number: int) -> str:
    unit, suffix = pick_unit_and_suffix(number, ["", "k", "M", "G"], 1000)
    return f"{number / unit:.1f}{suffix}" if suffix else str(number)


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 1 or not amount else f"${amount:.4f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


class Screen:
    """Where a view is shown; only one thread calls it, and what it raises ends the view and nothing else.

    Attributes:
        interval: Seconds from one frame to the next.
    """

    interval = 1.0

    def show(self, view: View) -> None:
        """Shows how things stand, instead of what was shown before or after it."""
        raise NotImplementedError

    def close(self, view: View) -> None:
        """Shows the last frame, and leaves the screen to others."""
        self.show(view)
