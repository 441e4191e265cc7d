"""An executor whose threads hold up neither the end of a search nor that of the interpreter."""

from __future__ import annotations

import contextvars
import itertools
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from mpromptune.execution.interrupts import SLICE, deferred, is_over, may_end, result_of

T = TypeVar("T")


class DaemonThreads(Executor):
    """A pool of daemon threads.

    The interpreter waits at its end for every thread of a `ThreadPoolExecutor`, so that one call
    that hangs would keep a process alive that the user has long interrupted.

    Args:
        number: Threads; each is started when it is first needed.
        name: Prefix of their names.
    """

    def __init__(self, number: int, name: str = "mpromptune") -> None:
        self._number = number
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._futures: set[Future[Any]] = set()  # not yet begun
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queues a call."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._futures.add(future)
            self._queue.put(partial(self._run, future, partial(fn, *args, **kwargs)))
            if len(self._threads) < self._number:
                with deferred():  # one that is not known would take the end of another
                    self._threads.append(started(self._work, f"{self._name}_{len(self._threads)}"))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls; ``cancel_futures`` cancels those that have not begun."""
        with self._lock:
            already, self._closed = self._closed, True
            if cancel_futures:
                for future in self._futures:
                    future.cancel()
        for _ in self._threads if not already else ():
            self._queue.put(None)
        if wait:
            self.join()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the threads to end, at most ``timeout`` seconds, where an interrupt may come.

        It ends as well when this context is over (`interrupts.ending`).
        """
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        for thread in self._threads:
            while thread.is_alive() and not is_over() and (left := deadline - time.monotonic()) > 0:
                thread.join(min(SLICE, left))

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()
            del call  # or the last call's result would be kept until the next one

    def _run(self, future: Future[T], call: Callable[[], T]) -> None:
        with self._lock:
            self._futures.discard(future)
        settle(future, call)


_NUMBERS = itertools.count()


def in_daemon(call: Callable[[], T]) -> Future[T]:
    """Begins a call in a daemon thread of its own."""
    future: Future[T] = Future()
    started(partial(settle, future, call), f"mpromptune-call_{next(_NUMBERS)}")
    return future


def in_time(call: Callable[[], T]) -> T:
    """The result of a call that may hang; where waiting may end, the call is made in another thread.

    Raises:
        Stopped: It is not waited for any longer (`interrupts.ending`).
    """
    if not may_end():
        return call()
    return result_of(in_daemon(partial(contextvars.copy_context().run, call)))


def settle(future: Future[T], call: Callable[[], T]) -> None:
    """Makes the call that a future stands for, unless that was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)


def started(target: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread, which has begun."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
