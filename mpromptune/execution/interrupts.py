"""How calls end early: Ctrl-C and SIGTERM, stops of a context, and waits that both can end.

This is own code because ``concurrent.futures.wait`` cannot be ended by an event nor, on every platform, by a
signal.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

from mpromptune.errors import CallCancelledError, SearchInterrupted, SearchTerminated

# NOTE: seconds that calls in flight may still take after an interrupt: long enough for most LM calls, and
# half of the ten seconds between SIGTERM and SIGKILL in container runtimes.
GRACE = 5.0
# NOTE: seconds of one wait; long waits consist of short ones. A signal that arrives just before the main
# thread waits is only noticed when the wait ends; on Windows this is true for every signal.
SLICE = 0.2

T = TypeVar("T")
Stop = Callable[[], bool]


class Stopped(BaseException):
    """A call was not begun because its result is no longer needed.

    It is not an ``Exception``, because programs and DSPy treat these as failures of the LM and continue.
    """


def contained(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The result of a call of the user's code.

    Of errors that are not an ``Exception``, only interrupts may end a run; any other fails only this call.
    For instance, tools raise ``asyncio.CancelledError`` when a session is closed.

    Raises:
        CallCancelledError: The call raised such another error, which is the cause.
    """
    try:
        return call(*args, **kwargs)
    except (Exception, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:
        raise CallCancelledError(f"the call ended with {type(error).__name__}: {error}") from error


# The stops of this context.
_STOPS: ContextVar[tuple[Stop, ...]] = ContextVar("mpromptune_stops", default=())


@contextlib.contextmanager
def stoppable(*stops: Stop) -> Iterator[None]:
    """When one of ``stops`` returns true, nothing more begins in this context, and all waiting ends."""
    token = _STOPS.set((*_STOPS.get(), *stops))
    try:
        yield
    finally:
        _STOPS.reset(token)


def current_stop() -> Stop:
    """A function that returns, from any thread, whether the result of this context is no longer needed.

    This is true when the run has stopped, or for an attempt after its timeout. Its thread continues, because
    it cannot be ended from outside, so code that spends something (LM calls above all) checks first, by this
    function or by `check_stopped`.
    """
    stops = _STOPS.get()
    return lambda: any(stop() for stop in stops)


def is_over() -> bool:
    """Whether the result of this context is no longer needed."""
    return current_stop()()


def may_end() -> bool:
    """Whether this context has stops, which may end its waiting early."""
    return bool(_STOPS.get())


def check_stopped() -> None:
    """End a chain of calls whose result is no longer needed.

    Raises:
        Stopped: The function of `current_stop` returns true.
    """
    if is_over():
        raise Stopped


class _Signals:
    """The signal handlers; only for the main thread, because signals reach no other."""

    _masks = _seen = 0
    _pending: BaseException | None = None
    _raised: BaseException | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Install handlers for signals that have the default handler; handlers of the user stay."""
        defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        mine = [number for number, handler in defaults.items() if signal.getsignal(number) is handler]
        if mine:
            self._masks = self._seen = 0
            self._pending = self._raised = None
        try:
            for number in mine:
                signal.signal(number, self._on_signal)
            yield
        finally:
            for number in mine:
                signal.signal(number, defaults[number])
            if mine:
                self._raised = None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._masks += 1
        try:
            yield
        finally:
            self._masks -= 1
            pending = self._pending
            if pending is not None and not self._masks:
                self._pending = None
                raise pending

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._seen += 1
        is_term = number == signal.SIGTERM
        error = SearchTerminated("Interrupted by SIGTERM.") if is_term else KeyboardInterrupt()
        if self._masks and self._seen == 1:
            self._pending = error
            return
        self._pending = None
        self._raised = error
        raise error

    def check(self) -> None:
        """Raise an interrupt again that got lost: Python ignores errors raised in a finalizer."""
        if self._raised is not None and sys.exc_info()[0] is None:
            raise self._raised


_SIGNALS = _Signals()


def handled() -> contextlib.AbstractContextManager[None]:
    """In the main thread, let SIGTERM interrupt as Ctrl-C does, and let both respect `deferred`.

    Only default handlers are replaced, and they are restored at the end. In other threads it does nothing.
    """
    return _SIGNALS.handled() if _is_main() else contextlib.nullcontext()


def deferred() -> contextlib.AbstractContextManager[None]:
    """Delay the first interrupt until the end of this context; a second one is raised at once.

    It works only inside `handled`, and is meant for steps that take a moment.
    """
    return _SIGNALS.deferred() if _is_main() else contextlib.nullcontext()


def interrupted(signalled: BaseException) -> type[SearchInterrupted]:
    """The class of the error with which an interrupt ends a search."""
    return SearchTerminated if isinstance(signalled, SystemExit) else SearchInterrupted


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def wait_for(
    futures: Iterable[Future[Any]],
    timeout: float = math.inf,
    unless: Stop = lambda: False,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Wait until all futures are done or ``unless()`` is true; an interrupt can end the waiting.

    It also ends when the result of this context is no longer needed. It calls ``meanwhile`` at intervals.
    """
    pending, deadline = set(futures), time.monotonic() + timeout
    while pending and not unless() and not is_over() and (left := deadline - time.monotonic()) > 0:
        if _is_main():
            _SIGNALS.check()
        pending = wait(pending, timeout=min(SLICE, left)).not_done
        meanwhile()


def pause(seconds: float) -> None:
    """Sleep; an interrupt can end it."""
    if _is_main():
        _SIGNALS.check()
    time.sleep(seconds)


def result_of(future: Future[T]) -> T:
    """Wait for the result of a future; an interrupt can end the waiting.

    Raises:
        Stopped: The result of this context is no longer needed.
    """
    wait_for([future])
    if not future.done():
        raise Stopped
    return future.result()


def chained(after: Future[bool], start: Callable[[], Future[T]], otherwise: T) -> Future[T]:
    """The result of ``start()``, which begins once ``after`` is true; ``otherwise`` if that never happens."""
    chained: Future[T] = Future()

    def settle(result: T) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            chained.set_result(result)

    def begin(known: Future[bool]) -> None:
        inner = None
        with contextlib.suppress(Exception):  # there is nothing to score, or the executor has been shut down
            inner = start() if known.result() else None
        if inner is None:
            settle(otherwise)
        else:
            inner.add_done_callback(lambda done: settle(otherwise if done.cancelled() else done.result()))

    after.add_done_callback(begin)
    return chained
