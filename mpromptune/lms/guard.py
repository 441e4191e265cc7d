"""Watches the LM requests of a compile: counts, paces and stops them, and has equal ones share an answer."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from mpromptune.errors import CallCancelledError
from mpromptune.execution.interrupts import Stopped, check_stopped, current_stop
from mpromptune.execution.limits import Budget
from mpromptune.execution.pace import Flight, Flights, Pace, Ticket
from mpromptune.execution.usage import Meter, Usage, current_meter, metered
from mpromptune.lms.adapters import patient, strict
from mpromptune.lms.errors import note_answered, note_raised_by_lm
from mpromptune.lms.prices import Pricing, tokens_of

logger = logging.getLogger(__name__)

# The meter as a setting of DSPy's: its own thread pools inherit these, but not context variables.
METER = "mpromptune_meter"
# NOTE: failures before its first answer after which an LM that is not found is taken not to exist: a gateway
# that spoils one answer in ten does so at the beginning of one run in a thousand.
_FIRST_FAILURES = 3
# NOTE: age in seconds of a request that equal ones stop waiting for; most clients give up by then.
_PATIENCE = 600.0

_FORWARDING = threading.Lock()

_UNSEEN = (
    "A program call has ended, and no LM call of it was seen. If the program asks an LM in threads of its "
    "own, nothing of that is counted, paced or stopped: max_tokens, max_cost and requests per minute do not "
    "hold. Start such threads with dspy.Parallel, or in a copy of the context: "
    "executor.submit(contextvars.copy_context().run, function, ...)."
)


@contextmanager
def measured(meter: Meter | None = None) -> Iterator[Meter]:
    """As `metered`, for LM requests made in DSPy's own threads too."""
    with metered(meter) as inner, dspy.context(**{METER: inner}):
        yield inner


def note_call(used: Usage) -> None:
    """Warns, once in a compile, where what a program asks its LM is not seen."""
    for guard in dspy.settings.callbacks or ():
        if isinstance(guard, Guard) and guard.budget.starts_unseen(used):
            logger.warning(_UNSEEN)


class _Relay:
    """DSPy's usage tracker for one request: takes its usage down and passes it on to the user's own."""

    def __init__(self, tracker: Any) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.wraps_another = False
        self.outer: Any = tracker
        if isinstance(tracker, _Relay):  # an LM that asks another LM
            tracker.wraps_another = True
            self.outer = tracker.outer

    def add_usage(self, model: str, usage: Mapping[str, Any]) -> None:
        self.entries.append((model, dict(usage)))
        if self.outer is not None:
            with _FORWARDING:
                self.outer.add_usage(model, usage)

    def get_total_tokens(self) -> Any:
        return {} if self.outer is None else self.outer.get_total_tokens()


@dataclass
class _Request:
    """One request under way.

    Attributes:
        lm: Who is asked.
        inputs: What.
        relay: Takes down its usage.
        context: In which the relay is DSPy's usage tracker.
        meter: What it counts for.
        uses_cache: Whether a cache may answer it.
        flight: Led by it, if any.
        follows: Whether it waited for the answer of an equal one, which came.
        ticket: Its leave, where requests are paced.
    """

    lm: Any
    inputs: Mapping[str, Any]
    relay: _Relay
    context: AbstractContextManager[None]
    meter: Meter
    uses_cache: bool
    flight: Flight | None = None
    follows: bool = False
    ticket: Ticket | None = None


@dataclass(eq=False)
class Guard(BaseCallback):
    """A callback of DSPy's, to be put in `dspy.context` around everything that may ask an LM.

    Attributes:
        budget: Its meter counts what no closer one does; when a limit of it is used up, no request
            is sent any more, unless it `spares` them.
        pricing: What answers cost.
        stopped: Set when no further request may be sent.
        pace: Caps per minute, if any.
        patience: Age in seconds of a request that equal ones stop waiting for.
        spares: Leaves programs under way alone that began within the limits, but for that of time.
    """

    budget: Budget = field(default_factory=Budget)
    pricing: Pricing = field(default_factory=Pricing)
    stopped: threading.Event = field(default_factory=threading.Event)
    pace: Pace | None = None
    patience: float = _PATIENCE
    spares: bool = False

    def __post_init__(self) -> None:
        self._outer: Guard | None = None
        self._flights = Flights(self.patience)
        self._requests: dict[str, _Request] = {}
        self._uncached: set[tuple[str, str]] = set()  # LMs found not to answer from a cache
        self._charging: set[tuple[str, str]] = set()  # LMs that have reported tokens
        self._answered: set[tuple[str, str]] = set()
        self._failures: Counter[tuple[str, str]] = Counter()  # of LMs that have not answered

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the requests of this context, beside the callbacks that are in force.

        A compile within a compile has one guard of its own, which obeys the outer one as well.
        """
        callbacks = list(dspy.settings.callbacks or [])
        guards = [callback for callback in callbacks if isinstance(callback, Guard)]
        self._outer = guards[-1] if guards else None
        self.pace = self.pace or (self._outer and self._outer.pace)
        callbacks = [*(c for c in callbacks if c not in guards), self]
        adapter = strict(patient(dspy.settings.adapter))
        with measured(self.budget.meter), dspy.context(callbacks=callbacks, adapter=adapter):
            yield

    def check(self) -> None:
        """Ends a program whose next request may not be sent.

        Raises:
            Stopped: The run is over, or a limit is used up.
        """
        check_stopped()
        may_ask = not self.budget.is_late if self.spares else self.budget.admits()
        if self.stopped.is_set() or not may_ask:
            raise Stopped
        if self._outer is not None:
            self._outer.check()

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Has a request wait until it may be sent; if it never may, raises what no `except` catches."""
        self.check()
        request = self._request(instance, inputs)
        try:
            with request.meter.waiting():
                self._join(request)
                if self.pace is not None and not request.follows:
                    request.ticket = self.pace.take(self._sleep)
            self.check()
            request.context.__enter__()
        except BaseException:
            self._land(request, succeeded=False)
            self._settle(request, Usage())
            raise
        self._requests[call_id] = request

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Counts it, and lets those go on that wait for its answer."""
        request = self._requests.pop(call_id, None)
        if request is None:
            return
        failed = exception is not None or outputs is None  # the latter is what DSPy says of a cancelled one
        self._judge(request, failed, exception)
        self._land(request, succeeded=not failed)
        request.context.__exit__(None, None, None)
        usage = self._usage(request, failed)
        if usage.tokens:
            self._charging.add(_kind(request.lm))
        if request.follows and usage.tokens:
            self._uncached.add(_kind(request.lm))
        self._settle(request, usage)
        request.meter.add(usage)

    def _judge(self, request: _Request, failed: bool, exception: BaseException | None) -> None:
        """Marks what was raised below the LM."""
        kind, asked = _kind(request.lm), request.inputs.get("messages")
        if not failed:
            self._answered.add(kind)
            note_answered(asked)
        else:
            self._failures[kind] += kind not in self._answered
            if not isinstance(exception, Exception):
                exception = CallCancelledError("a request to a language model was cancelled")
            note_raised_by_lm(exception, self._is_new(kind), asked)

    def _is_new(self, kind: tuple[str, str]) -> bool:
        return kind not in self._answered and self._failures[kind] >= _FIRST_FAILURES

    def _request(self, lm: Any, inputs: Mapping[str, Any]) -> _Request:
        relay = _Relay(dspy.settings.usage_tracker)
        meter = dspy.settings.get(METER) or current_meter() or self.budget.meter
        use_cache = (inputs.get("kwargs") or {}).get("cache", getattr(lm, "cache", False))
        return _Request(lm, inputs, relay, dspy.context(usage_tracker=relay), meter, bool(use_cache))

    def _join(self, request: _Request) -> None:
        shares = request.uses_cache and _kind(request.lm) not in self._uncached
        key = _key(request.lm, request.inputs) if shares else None
        flight = None if key is None else self._flights.join(key, self.check, current_stop())
        request.follows = flight is not None and flight.succeeded
        request.flight = None if request.follows else flight

    def _land(self, request: _Request, succeeded: bool) -> None:
        if request.flight is not None:
            self._flights.land(request.flight, succeeded)

    def _sleep(self, seconds: float) -> None:
        self.stopped.wait(seconds)
        self.check()

    def _usage(self, request: _Request, failed: bool) -> Usage:
        """What a request used; an answer that nobody charged for is a cache's."""
        entries = request.relay.entries
        if not entries and not _reports(request.lm):
            entries = _remembered(request)
        if not failed and request.relay.wraps_another and not entries:
            return Usage()  # the LM that it asked has been counted
        tokens = [tokens_of(usage) for _, usage in entries]
        prompt, completion = sum(sent for sent, _ in tokens), sum(received for _, received in tokens)
        free = not failed and not prompt + completion
        if free and request.uses_cache and (not entries or _kind(request.lm) in self._charging):
            return Usage(cache_hits=1)
        cost = sum(self.pricing.cost(request.lm, model, usage) for model, usage in entries)
        return Usage(lm_calls=1, prompt_tokens=prompt, completion_tokens=completion, cost=cost)

    def _settle(self, request: _Request, usage: Usage) -> None:
        if self.pace is None:
            return
        if usage.lm_calls:  # without a ticket, it waited for an answer that then was not to be had
            self.pace.settle(request.ticket or self.pace.owe(), usage.tokens)
        elif request.ticket is not None:
            self.pace.refund(request.ticket)


def _kind(lm: Any) -> tuple[str, str]:
    return f"{type(lm).__module__}.{type(lm).__qualname__}", str(getattr(lm, "model", ""))


def _reports(lm: Any) -> bool:
    """Whether DSPy charges an LM's answers to the tracker; up to 3.2, it does those of its own LM only."""
    return isinstance(lm, dspy.LM) or hasattr(dspy.BaseLM, "_record_response")


def _remembered(request: _Request) -> list[tuple[str, dict[str, Any]]]:
    """The usage that the LM's history has for this very request; empty for one that a cache answered."""
    ours = [request.inputs.get(name) for name in ("prompt", "messages")]
    for entry in reversed(list(getattr(request.lm, "history", ()))):
        if entry.get("prompt") is ours[0] and entry.get("messages") is ours[1]:
            hit = getattr(entry.get("response"), "cache_hit", False)
            return [(request.lm.model, {} if hit else dict(entry.get("usage") or {}))]
    return []


def _key(lm: Any, inputs: Mapping[str, Any]) -> Hashable:
    """What makes two requests equal for DSPy's cache; None where that cannot be said."""
    request = {
        "lm": [type(lm).__module__, type(lm).__qualname__, getattr(lm, "model", None)],
        "model_type": getattr(lm, "model_type", None),
        "settings": getattr(lm, "kwargs", None),
        **inputs,
    }
    try:
        return str(dspy.cache.cache_key(request))
    except Exception:  # noqa: BLE001 - whatever a request holds that JSON does not
        return None
