"""Scores computed by any executor, whose workers may be processes on other machines and may die."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from mpromptune.errors import CallTimeoutError, ExecutorBrokenError, InvalidArgumentError, WorkerLostError
from mpromptune.execution import worker
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.execution.interrupts import SLICE, Stopped, current_stop, result_of
from mpromptune.execution.pool import DaemonThreads, Score, in_daemon
from mpromptune.execution.usage import record
from mpromptune.execution.worker import cannot_travel, pack, unpack_error

T = TypeVar("T")

ExecutorSpec = Executor | Callable[[], Executor] | None

_FACTORY = "executor=lambda: ProcessPoolExecutor(4)"


def check_executor(given: Any) -> None:
    """Require an executor, a callable (which makes one), or None.

    Raises:
        InvalidArgumentError: ``given`` is something else.
    """
    if given is None or isinstance(given, Executor) or callable(given):
        return
    hint = " A Dask client has one: client.get_executor()." if hasattr(given, "get_executor") else ""
    raise InvalidArgumentError(
        f"executor must be a concurrent.futures.Executor, or a callable without arguments that makes one; "
        f"got {given!r}.{hint}"
    )


class Workplace:
    """The executor on which calls are made: a given one, or one that a given callable makes.

    A given executor is left open. One made by the callable is closed, and replaced when it breaks, as a pool
    of processes does when one of them dies. None means threads of the search.
    """

    def __init__(self, given: ExecutorSpec = None) -> None:
        check_executor(given)
        self._make = given if given is not None and not isinstance(given, Executor) else None
        self._executor = given if isinstance(given, Executor) else None
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._closed = threading.Event()

    def __enter__(self) -> Workplace:
        if self._make is not None:
            self._executor = _made(self._make)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._make is not None and self._executor is not None:
            _close(self._executor, any(not future.done() for future in tuple(self._pending)))

    @property
    def threads(self) -> Executor | None:
        """The executor if its workers share the memory of this process, so that nothing must be sent."""
        subinterpreters = getattr(futures, "InterpreterPoolExecutor", ())
        shares = isinstance(self._executor, ThreadPoolExecutor | DaemonThreads)
        return self._executor if shares and not isinstance(self._executor, subinterpreters) else None

    @property
    def is_remote(self) -> bool:
        """Whether there is an executor whose workers do not share the memory of this process."""
        return self._executor is not None and self.threads is None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a call in a worker; the function itself must raise nothing.

        Raises:
            Stopped: The result is no longer needed (`current_stop`), and the call was cancelled.
            WorkerLostError: The worker was lost; another one may answer.
            ExecutorBrokenError: The executor accepts no more calls.
        """
        executor, unwanted = self._executor, current_stop()
        assert executor is not None
        try:
            future = executor.submit(function, *args)
        except Exception as error:
            raise self._lost(executor, error, is_broken=True) from error
        self._pending.add(future)
        try:
            while not future.done():
                if self._closed.is_set():
                    raise Stopped
                # Dask's futures do not say which calls have begun; its workers are stopped by `broadcast`.
                if unwanted() and not hasattr(executor, "_client"):
                    future.cancel()  # has no effect if the call has begun: it is paid for, so wait for it
                wait([future], SLICE)
        finally:
            self._pending.discard(future)
        if future.cancelled() and unwanted():
            raise Stopped
        failed = CancelledError() if future.cancelled() else future.exception()
        if failed is not None:
            raise self._lost(executor, failed, isinstance(failed, BrokenExecutor)) from failed
        return future.result()

    def broadcast(self, function: Callable[..., T], *args: Any) -> list[T]:
        """The results of a call in every present worker; empty if the executor cannot do that (Dask can)."""
        client: Any = getattr(self._executor, "_client", None)
        if not hasattr(client, "run"):
            return []
        try:
            told = client.run(function, *args, on_error="return")
        except Exception:  # noqa: BLE001 - no cluster; a worker that lacks the score asks for it later
            return []
        return [said for said in told.values() if not isinstance(said, BaseException)]

    def _lost(self, executor: Executor, error: BaseException, is_broken: bool) -> Exception:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        if not is_broken:
            return WorkerLostError(f"A worker of the executor was lost ({said}).")
        if self._make is None:
            return ExecutorBrokenError(
                f"The executor takes no more calls ({said}). Pass a callable that makes one, such as "
                f"{_FACTORY}: it is called again when an executor breaks."
            )
        with self._lock:
            if self._executor is executor and not self._closed.is_set():
                _close(executor, False)
                self._executor = _made(self._make)
        return WorkerLostError(f"The executor broke ({said}), and another one was made.")


def _made(make: Callable[[], Executor]) -> Executor:
    made = make()
    if not isinstance(made, Executor):
        raise InvalidArgumentError(f"executor must make a concurrent.futures.Executor; it made {made!r}.")
    return made


def _close(executor: Executor, hangs: bool) -> None:
    """Close an executor; if it ``hangs``, end its processes, for which the interpreter would wait."""
    processes = dict(getattr(executor, "_processes", None) or {}) if hangs else {}
    try:
        executor.shutdown(wait=False, cancel_futures=True)
    except TypeError:  # Dask's executor lacks this argument
        executor.shutdown(wait=False)
    for process in processes.values():
        process.terminate()


@contextmanager
def remote_score(
    place: Workplace,
    score: Score,
    parts: Mapping[str, Any],
    timeout: float | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[Score]:
    """``score(params, example)``, computed by a worker that shares no memory with this process.

    The score is sent to one worker (with Dask, to all) in advance, and to each worker that turns out to lack
    it. The usage of a call is recorded here, and its error is raised here.

    Raises:
        TravelError: The score cannot be used in a worker; the message names the part that cannot.
        ExecutorBrokenError: The executor runs no calls.
    """
    payload, key, numbers = pack(score, parts), uuid.uuid4().hex, itertools.count()
    stopped, over = stopped or threading.Event(), threading.Event()

    def remote(params: dict[str, int], example: int) -> float:
        call = key, params, example, timeout, next(numbers)
        answer = place.run(worker.perform, *call) or place.run(worker.perform, *call, payload)
        assert answer is not None
        value, packed, usage = answer
        record(usage)
        if value is not None:
            return value
        assert packed is not None
        error = unpack_error(packed)
        if isinstance(error, Stopped) and timeout is not None and not stopped.is_set():
            raise CallTimeoutError(f"no answer within {timeout:g} s")
        raise error

    def stop_workers() -> None:
        while not over.wait(SLICE):
            if stopped.is_set():
                place.broadcast(worker.stop, key)
                over.wait()
        place.broadcast(worker.stop, key, True)

    told = place.broadcast(worker.hold, key, payload)
    _require_readable(place, told or [_ask(place, key, payload)], parts)
    if told:
        in_daemon(stop_workers)
    try:
        yield remote
    finally:
        over.set()


def _require_readable(place: Workplace, said: list[str | None], parts: Mapping[str, Any]) -> None:
    wrong = [answer for answer in said if answer is not None]
    if wrong:
        names = (name for name, part in parts.items() if _ask(place, None, pack(part, {})) is not None)
        raise cannot_travel(next(names, "the score"), wrong[0])


def _ask(place: Workplace, key: str | None, payload: bytes) -> str | None:
    """Let a worker unpack ``payload``, and return what is wrong with it; an interrupt can end the waiting."""
    try:
        return result_of(in_daemon(partial(place.run, worker.hold, key, payload)))
    except (WorkerLostError, ExecutorBrokenError) as error:
        raise ExecutorBrokenError(
            f"The executor's workers cannot run m-promptune: {error} It must be installed where they run, "
            "and a script that starts processes needs `if __name__ == '__main__':`. No call was made."
        ) from error


@contextmanager
def measuring(
    score: Score,
    place: Workplace,
    num_threads: int,
    retry: RetryPolicy | None,
    stopped: threading.Event,
) -> Iterator[tuple[Score, Executor]]:
    """The score to call, and the executor of this process that calls it.

    The executor is the given one if it shares the memory of this process. Otherwise it is a pool of threads,
    which is closed without waiting for calls that hang; with a remote score, its threads only wait.
    """
    with place:
        if place.threads is not None:
            yield score, place.threads
            return
        pool = DaemonThreads(num_threads)
        try:
            if not place.is_remote:
                yield score, pool
                return
            timeout = None if retry is None else retry.timeout
            with remote_score(place, score, {"the score": score}, timeout, stopped) as remote:
                yield remote, pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
