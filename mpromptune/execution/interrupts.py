"""How calls end early: Ctrl-C and SIGTERM, stops that a context obeys, and waits that obey both.

By hand, because ``concurrent.futures.wait`` can neither be ended by an event nor, everywhere, by a signal.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

from mpromptune.errors import CallCancelledError, SearchInterrupted, SearchTerminated

# NOTE: seconds that calls in flight are given to come back after an interrupt: long enough for most
# LM calls, and half of the ten seconds that container runtimes leave between SIGTERM and SIGKILL.
GRACE = 5.0
# NOTE: seconds of one wait. A signal that comes when the main thread is just about to wait is not
# noticed before the wait ends, and on Windows none is; so long waits are made of short ones.
SLICE = 0.2

T = TypeVar("T")
Stop = Callable[[], bool]


class Stopped(BaseException):
    """A call that was not begun, because nobody waits for it any more.

    No Exception: programs, and DSPy, take any of those for a failure of the LM, and go on.
    """


def contained(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the user's code returns. Of errors that are no ``Exception``, only interrupts end a run.

    Any other fails this one call: tools raise ``asyncio.CancelledError`` when a session is dropped.

    Raises:
        CallCancelledError: There was such an error; it is the cause.
    """
    try:
        return call(*args, **kwargs)
    except (Exception, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:
        raise CallCancelledError(f"the call ended with {type(error).__name__}: {error}") from error


# The stops that this context obeys.
_STOPS: ContextVar[tuple[Stop, ...]] = ContextVar("mpromptune_stops", default=())


@contextlib.contextmanager
def stoppable(*stops: Stop) -> Iterator[None]:
    """Once any stop says so, nothing more begins in this context, and nothing is waited for there."""
    token = _STOPS.set((*_STOPS.get(), *stops))
    try:
        yield
    finally:
        _STOPS.reset(token)


def current_stop() -> Stop:
    """Says, now and from any thread later on, whether nobody waits any more for what runs here.

    That is so once the run has stopped, and for an attempt that was given up after its timeout. Both
    go on in their threads, which nothing can end from outside: whatever is about to spend something,
    an LM call above all, asks first, or calls `check_stopped`.
    """
    stops = _STOPS.get()
    return lambda: any(stop() for stop in stops)


def is_over() -> bool:
    """Whether nobody waits any more for what runs in this context."""
    return current_stop()()


def may_end() -> bool:
    """Whether this context may be over before what it waits for is done."""
    return bool(_STOPS.get())


def check_stopped() -> None:
    """Ends a chain of calls that nobody waits for any more.

    Raises:
        Stopped: As `current_stop` says.
    """
    if is_over():
        raise Stopped


class _Signals:
    """The handlers. Signals reach the main thread alone, so only that one has any of this."""

    _masks = _seen = 0
    _pending: BaseException | None = None
    _raised: BaseException | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handlers for what nobody else handles; those of the user are left alone."""
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
        """Raises an interrupt again that nobody has seen: Python ignores what is raised in a finalizer."""
        if self._raised is not None and sys.exc_info()[0] is None:
            raise self._raised


_SIGNALS = _Signals()


def handled() -> contextlib.AbstractContextManager[None]:
    """In the main thread, makes SIGTERM interrupt as Ctrl-C does, and both respect `deferred`.

    Only default handlers are replaced, and they are put back; other threads change nothing.
    """
    return _SIGNALS.handled() if _is_main() else contextlib.nullcontext()


def deferred() -> contextlib.AbstractContextManager[None]:
    """Has the first interrupt wait until what belongs together is done; a second one does not wait.

    Only for signals that come while `handled`, and for what takes a moment.
    """
    return _SIGNALS.deferred() if _is_main() else contextlib.nullcontext()


def interrupted(signalled: BaseException) -> type[SearchInterrupted]:
    """The class of error that an interrupt ends a search with."""
    return SearchTerminated if isinstance(signalled, SystemExit) else SearchInterrupted


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def wait_for(
    futures: Iterable[Future[Any]],
    timeout: float = math.inf,
    unless: Stop = lambda: False,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Waits until all are done, where an interrupt may come, or until ``unless`` says to stop waiting.

    It ends as well once this context is over. Now and then it calls ``meanwhile``.
    """
    pending, deadline = set(futures), time.monotonic() + timeout
    while pending and not unless() and not is_over() and (left := deadline - time.monotonic()) > 0:
        if _is_main():
            _SIGNALS.check()
        pending = wait(pending, timeout=min(SLICE, left)).not_done
        meanwhile()


def pause(seconds: float) -> None:
    """Sleeps, where an interrupt may come."""
    if _is_main():
        _SIGNALS.check()
    time.sleep(seconds)


def result_of(future: Future[T]) -> T:
    """Its result, awaited where an interrupt may come.

    Raises:
        Stopped: It is not waited for any longer: this context is over.
    """
    wait_for([future])
    if not future.done():
        raise Stopped
    return future.result()
