"""Runs programs in workers of other processes, and sends all that they need."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.clients import DISK_CACHE_DIR

from mpromptune.errors import WorkerLostError
from mpromptune.execution.interrupts import Stopped
from mpromptune.execution.pace import Pace, Ticket
from mpromptune.execution.pool import Score
from mpromptune.execution.remote import Workplace, remote_score
from mpromptune.execution.usage import Meter, current_meter, metered
from mpromptune.lms.adapters import given_adapter
from mpromptune.lms.guard import Guard
from mpromptune.lms.metering import METER, Pricing, measured
from mpromptune.mipro.configurations import ProgramRunner, ProgramSpace

# DSPy settings that belong to one thread or one call, and are created for each.
_OF_A_CALL = frozenset(
    {"trace", "caller_predict", "caller_modules", "usage_tracker", "send_stream", "stream_listeners", METER}
)
# Name among the params of a remote call with candidates that the worker may lack.
_WRITTEN = "mpromptune_written"
# Settings of a cache that are sent; its size may differ between machines.
_CACHE = ("enable_disk_cache", "enable_memory_cache", "disk_cache_dir")


@contextmanager
def remote_programs(
    place: Workplace,
    guard: Guard,
    timeout: float | None,
    programs: ProgramSpace,
    valset: Sequence[Any],
    metric: Any,
    takes_notes: bool = False,
) -> Iterator[Score | None]:
    """A score that runs configurations in other processes; None if the executor has no such workers.

    Program, data, metric, LM and settings are sent to a worker (with Dask, to all) in advance. Every worker
    has its own guard, which counts its LM requests.

    Raises:
        TravelError: Something cannot be sent to a worker or used there; the message says what.
        ExecutorBrokenError: The executor runs no calls.
    """
    if not place.is_remote:
        yield None
        return
    runner = ProgramRunner(programs, valset, metric, takes_notes=takes_notes)
    run = _RemoteRunner(runner, guard.pricing, dspy_settings(), frozenset(guard.answered))
    parts = {"the program": programs, "the validation set": list(valset), "the metric": metric}
    parts.update({f"DSPy's setting {name!r}": value for name, value in run.settings.items()})
    parts["the option 'prices'"] = guard.pricing
    with remote_score(place, run, parts, timeout, guard.stopped) as score:
        expected = len(programs.program.predictors())
        score = _Sending(score, programs)
        yield score if guard.pace is None else _Paced(score, guard, guard.pace, expected)


class _RemoteRunner:
    """A runner of programs that is sent to a worker together with DSPy's settings and cache settings."""

    def __init__(
        self,
        run: ProgramRunner,
        pricing: Pricing,
        settings: Mapping[str, Any],
        answered: frozenset[str] = frozenset(),
    ) -> None:
        self.settings = settings
        self._run, self._pricing = run, pricing
        self._guard = Guard(pricing=pricing, answered=set(answered))

    def __reduce__(self) -> Any:
        answered = frozenset(self._guard.answered)
        return _arrived, (self._run, self._pricing, self.settings, answered, _cache())

    def __call__(self, params: dict[str, Any], example: int) -> float:
        meter = current_meter()
        for name, index, written in params.pop(_WRITTEN, ()):
            self._run.programs.adopt(name, index, written)
        with dspy.context(**self.settings), self._guard.watching(), measured(meter):
            return self._run(params, example)


def _arrived(
    run: ProgramRunner,
    pricing: Pricing,
    settings: Mapping[str, Any],
    answered: frozenset[str],
    cache: Mapping[str, Any],
) -> _RemoteRunner:
    """Rebuild the runner in a worker; called once in each."""
    if any(getattr(dspy.cache, name) != value for name, value in cache.items()):
        dspy.configure_cache(**cache)
    return _RemoteRunner(run, pricing, settings, answered)


def dspy_settings() -> dict[str, Any]:
    """DSPy's settings in this context, without those that belong to this process."""
    settings = {name: value for name, value in dspy.settings.copy().items() if name not in _OF_A_CALL}
    settings["callbacks"] = [c for c in settings.get("callbacks") or [] if not isinstance(c, Guard)]
    settings["adapter"] = given_adapter(settings.get("adapter"))  # the worker makes its own substitute
    if getattr(settings.get("lm"), "history", None):
        settings["lm"] = copy.copy(settings["lm"])
        settings["lm"].history = []
    return settings


def _cache() -> dict[str, Any]:
    """The settings of the cache, without its default folder, which may differ between machines."""
    found = {name: getattr(dspy.cache, name) for name in _CACHE if hasattr(dspy.cache, name)}
    if found.get("disk_cache_dir") == str(DISK_CACHE_DIR):
        del found["disk_cache_dir"]
    return found


class _Sending:
    """A remote score that sends the candidates that were written since the program was sent.

    Args:
        score: The remote score.
        programs: The configurations.
    """

    def __init__(self, score: Score, programs: ProgramSpace) -> None:
        self._score, self._programs = score, programs
        self._sent = {name: len(some) for name, some in programs.candidates.items()}

    def __call__(self, params: dict[str, int], example: int) -> float:
        new = [(name, index) for name, index in params.items() if index >= self._sent[name]]
        if not new:
            return self._score(params, example)
        written = [(name, index, self._programs.saved(name, index)) for name, index in new]
        return self._score({**params, _WRITTEN: written}, example)  # type: ignore[dict-item]


class _Paced:
    """A remote score that gets permission for all requests of a call before the call is sent.

    Workers cannot ask for permission themselves. So each call reserves as many requests as any earlier call
    has made, until a minute after its end. Only a call that makes more requests than any earlier one, or
    takes longer than a minute, can exceed a limit per minute.

    Args:
        score: The remote score.
        guard: Knows when no request may be sent any more.
        expected: Expected number of requests in a call.
    """

    def __init__(self, score: Score, guard: Guard, pace: Pace, expected: int) -> None:
        self._score = score
        self._guard = guard
        self._pace = pace
        self._most = max(1, expected)

    def __call__(self, params: dict[str, int], example: int) -> float:
        ticket = self._leave()
        with metered() as meter:
            try:
                return self._score(params, example)
            except (Stopped, WorkerLostError):  # its usage is unknown, so its ticket stays as it is
                ticket = None
                raise
            finally:
                if ticket is not None:
                    self._most = max(self._most, meter.total.lm_calls)
                    self._pace.settle(ticket, meter.total.tokens, meter.total.lm_calls)

    def _leave(self) -> Ticket | None:
        with (current_meter() or Meter()).waiting():
            return self._pace.take(self._sleep, self._most)

    def _sleep(self, seconds: float) -> None:
        self._guard.stopped.wait(seconds)
        self._guard.check()
