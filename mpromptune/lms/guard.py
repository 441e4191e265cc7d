"""Watches the LM requests of a compile: counts, paces and stops them, and lets equal ones share an answer."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from mpromptune.errors import CallCancelledError
from mpromptune.execution.interrupts import Stopped, check_stopped, current_stop
from mpromptune.execution.limits import Budget
from mpromptune.execution.pace import Flight, Flights, Pace
from mpromptune.execution.usage import Usage
from mpromptune.lms.adapters import watched
from mpromptune.lms.errors import note_answered, note_raised_by_lm
from mpromptune.lms.metering import Pricing, Relay, measured, meter_of_requests, settings_of, tokens_of

logger = logging.getLogger(__name__)

# NOTE: number of failures before its first answer after which an LM that is not found, or not connected to,
# is so for good: a gateway that fails on one request in ten does so three times at the start of one run in a
# thousand.
_FIRST_FAILURES = 3
# NOTE: age of a request in seconds after which equal requests stop waiting for it; most clients time out
# earlier.
_PATIENCE = 600.0

_UNSEEN = (
    "A program call has ended, and no LM call of it was seen. If the program calls an LM in threads of its "
    "own, these calls are not counted, paced or stopped: max_tokens, max_cost and requests per minute do not "
    "hold. Start such threads with dspy.Parallel, or in a copy of the context: "
    "executor.submit(contextvars.copy_context().run, function, ...)."
)

_NEVER_ANSWERED = (
    "None of the {} requests to {} so far was answered: check the name of the model, its api_base and its key"
)

# The end of a request: its error or None, and whether it was answered.
_End = tuple[BaseException | None, bool]


def note_call(used: Usage) -> None:
    """Warn once in a compile if the LM calls of the program are not seen."""
    for guard in dspy.settings.callbacks or ():
        if isinstance(guard, Guard) and guard.budget.starts_unseen(used):
            logger.warning(_UNSEEN)


@dataclass(eq=False)
class Guard(BaseCallback):
    """A DSPy callback for `dspy.context` around all code that may call an LM.

    Attributes:
        budget: Its meter counts requests without a closer meter. When one of its limits is reached, no
            further request is sent, except with `spares`.
        pricing: The prices of answers.
        stopped: Set when no further request may be sent.
        pace: Limits per minute, if there are any.
        spares: Whether programs that began within the limits may finish; the time limit still holds.
        answered: The LMs that have answered a request.
    """

    budget: Budget = field(default_factory=Budget)
    pricing: Pricing = field(default_factory=Pricing)
    stopped: threading.Event = field(default_factory=threading.Event)
    pace: Pace | None = None
    spares: bool = False
    answered: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._outer: Guard | None = None
        self._flights = Flights(_PATIENCE)
        self._requests: dict[str, Generator[None, _End, None]] = {}
        self._uncached: set[str] = set()  # LMs whose answers are not cached after all
        self._charging: set[str] = set()  # LMs that have reported tokens
        self._failures: Counter[str] = Counter()  # number of failures of LMs without an answer so far

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context whose requests are watched; the user's callbacks stay active.

        A compile within a compile has its own guard, which also obeys the outer one.
        """
        callbacks = list(dspy.settings.callbacks or [])
        guards = [callback for callback in callbacks if isinstance(callback, Guard)]
        self._outer = guards[-1] if guards else None
        self.pace = self.pace or (self._outer and self._outer.pace)
        callbacks = [*(c for c in callbacks if c not in guards), self]
        adapter = watched(dspy.settings.adapter)
        with measured(self.budget.meter), dspy.context(callbacks=callbacks, adapter=adapter):
            yield

    def check(self) -> None:
        """End a program whose next request must not be sent.

        Raises:
            Stopped: The run is over, or a limit was reached.
        """
        check_stopped()
        may_ask = not self.budget.is_late if self.spares else self.budget.admits()
        if self.stopped.is_set() or not may_ask:
            raise Stopped
        if self._outer is not None:
            self._outer.check()

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Wait until the request may be sent; if it never may, raise `Stopped` (no ``Exception``)."""
        self.check()
        request = self._request(instance, inputs)
        next(request)
        self._requests[call_id] = request

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Count the request, and end the waiting of equal requests."""
        request = self._requests.pop(call_id, None)
        if request is not None:
            with suppress(StopIteration):  # a request without outputs and error was cancelled
                request.send((exception, exception is None and outputs is not None))

    def _request(self, lm: Any, inputs: Mapping[str, Any]) -> Generator[None, _End, None]:
        """One request: the code before ``yield`` runs before it is sent, the rest when it has ended."""
        kind, cacheable = _kind(lm), bool(settings_of(lm, inputs.get("kwargs"))["cache"])
        meter = meter_of_requests() or self.budget.meter
        relay = Relay(dspy.settings.usage_tracker)
        flight: Flight | None = None
        ticket, follows, answered, used = None, False, False, Usage()
        try:
            with meter.waiting():
                if cacheable and kind not in self._uncached and (key := _key(lm, inputs)) is not None:
                    flight = self._flights.join(key, self.check, current_stop())
                    follows = flight is not None and flight.succeeded  # an equal one has been answered
                if self.pace is not None and not follows:
                    ticket = self.pace.take(self._sleep)
            self.check()
            with dspy.context(usage_tracker=relay):
                error, answered = yield
            self._judge(lm, inputs.get("messages"), error, answered)
            used = self._usage(lm, relay, inputs, answered, cacheable)
            if used.tokens:
                self._charging.add(kind)
                self._uncached |= {kind} if follows else set()
            meter.add(used)
        finally:
            if flight is not None and not follows:
                self._flights.land(flight, answered)
            if self.pace is not None:
                if used.lm_calls:  # without a ticket if it waited for an answer that was not cached after all
                    self.pace.settle(ticket, used.tokens)
                elif ticket is not None:
                    self.pace.settle(ticket, 0, requests=0)  # a cache answered

    def _judge(self, lm: Any, asked: Any, error: BaseException | None, answered: bool) -> None:
        """Note whether the LM answered, and mark its error."""
        kind, name = _kind(lm), getattr(lm, "model", None) or type(lm).__name__
        if answered:
            self.answered.add(kind)
            note_answered(asked)
            return
        self._failures[kind] += kind not in self.answered
        if not isinstance(error, Exception):
            error = CallCancelledError("a request to a language model was cancelled")
        failures = 0 if kind in self.answered else self._failures[kind]
        is_new = failures >= _FIRST_FAILURES
        advice = _NEVER_ANSWERED.format(failures, name) if is_new else ""
        note_raised_by_lm(error, is_new, asked, advice)

    def _sleep(self, seconds: float) -> None:
        self.stopped.wait(seconds)
        self.check()

    def _usage(
        self, lm: Any, relay: Relay, inputs: Mapping[str, Any], answered: bool, cacheable: bool
    ) -> Usage:
        """The usage of a request; an answer without tokens is a cache hit."""
        usages = relay.usages(lm, inputs)
        if answered and relay.wraps_another and not usages:
            return Usage()  # the LM that it called has been counted
        tokens = [tokens_of(usage) for _, usage in usages]
        prompt, completion = sum(sent for sent, _ in tokens), sum(received for _, received in tokens)
        free = answered and cacheable and not prompt + completion
        if free and (not usages or _kind(lm) in self._charging):
            return Usage(cache_hits=1)
        cost = sum(self.pricing.cost(lm, model, usage) for model, usage in usages)
        return Usage(lm_calls=1, prompt_tokens=prompt, completion_tokens=completion, cost=cost)


def _kind(lm: Any) -> str:
    """The class, model and address of an LM: one model may be served at several addresses."""
    settings = getattr(lm, "kwargs", None) or {}
    address = settings.get("api_base") or settings.get("base_url") or ""
    return f"{type(lm).__module__}.{type(lm).__qualname__} {getattr(lm, 'model', '')} {address}"


def _key(lm: Any, inputs: Mapping[str, Any]) -> Hashable | None:
    """The key of a request in DSPy's cache; None if it has none."""
    request = {
        "lm": [type(lm).__module__, type(lm).__qualname__, getattr(lm, "model", None)],
        "model_type": getattr(lm, "model_type", None),
        "settings": getattr(lm, "kwargs", None),
        **inputs,
    }
    try:
        return str(dspy.cache.cache_key(request))
    except Exception:  # noqa: BLE001 - a request may contain objects that JSON does not support
        return None
