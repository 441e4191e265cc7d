"""What the live view of a compile shows at one moment, and how it is put into words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from mpromptune.execution.limits import Limits
from mpromptune.execution.throttle import Load
from mpromptune.execution.usage import Usage
from mpromptune.show.progress import Progress, Standing


@dataclass(frozen=True)
class BarFrame:
    """One step of the compile.

    Attributes:
        title: Its name.
        unit: What is counted.
        done: So many of them are done.
        total: Of so many.
        seconds: Since it began, until it ended.
        seconds_left: As far as that can be said.
        ended: Whether it is over.
    """

    title: str
    unit: str
    done: int
    total: int
    seconds: float
    seconds_left: float | None
    ended: bool

    @property
    def count(self) -> str:
        """What is done, of what."""
        return f"{self.done}/{self.total} {self.unit}"

    @property
    def percent(self) -> int:
        """What is done, rounded down."""
        return 100 * self.done // max(self.total, 1)

    @property
    def elapsed(self) -> str:
        """How long it has taken so far."""
        return duration(self.seconds)

    @property
    def left(self) -> str:
        """How long it will take; nothing where that is not known."""
        if self.ended or self.seconds_left is None:
            return ""
        return f"{duration(self.seconds_left)} left"


@dataclass(frozen=True)
class Frame:
    """All of it.

    Attributes:
        bars: The steps that have begun.
        usage: What all steps have used.
        limits: What they may use.
        load: The calls in flight.
        search: The last report of the search, once there is one.
        ended: Whether the compile is over.
    """

    bars: tuple[BarFrame, ...]
    usage: Usage
    limits: Limits
    load: Load
    search: Progress | None = None
    ended: bool = False

    @property
    def status(self) -> list[str]:
        """What is to be said besides: scores, expenses, concurrency; a line each."""
        lines = [", ".join(_scores(self.search)), ", ".join(_expenses(self.usage, self.limits))]
        return [line for line in (*lines, "" if self.ended else concurrency(self.load)) if line]


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


def _expenses(usage: Usage, limits: Limits) -> Iterator[str]:
    yield f"{usage.lm_calls} LM calls"
    if usage.cache_hits:
        yield f"{usage.cache_hits} cache hits"
    if usage.tokens or limits.max_tokens:
        yield f"{_of(_rounded(usage.tokens), limits.max_tokens and _rounded(limits.max_tokens))} tokens"
    if usage.cost or limits.max_cost:
        yield _of(_dollars(usage.cost), limits.max_cost and _dollars(limits.max_cost))


def concurrency(load: Load) -> str:
    """The calls in flight, and how many may be."""
    words = f"{load.running} of {load.most} calls in flight"
    if load.limit < load.most:
        words += f", {load.limit} allowed because of rate limits"
    if load.pause >= 1:
        words += f", pausing for {load.pause:.0f} s"
    return words


def _of(used: str, limit: str | float | None) -> str:
    return f"{used} of {limit}" if limit else used


def _rounded(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 1 or not amount else f"${amount:.4f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=int(seconds)))
