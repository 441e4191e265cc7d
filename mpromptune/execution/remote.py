"""Scores computed by any executor: its workers may be other processes, on other machines, and may die."""

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
    """Refuses what is neither an executor nor makes one.

    Raises:
        InvalidArgumentError: It is not.
    """
    if given is None or isinstance(given, Executor) or callable(given):
        return
    hint = " A Dask client has one: client.get_executor()." if hasattr(given, "get_executor") else ""
    raise InvalidArgumentError(
        f"executor must be a concurrent.futures.Executor, or a callable without arguments that makes one; "
        f"got {given!r}.{hint}"
    )


class Workplace:
    """Where calls are made: an executor that was given, or those that a callable makes, one after another.

    What was given is left open. What was made is closed, and made anew when it breaks, as a pool of
    processes does for good when one of them dies.

    Args:
        given: An executor, a callable that makes one, or None for threads of the search's own.
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
        """The executor, where its workers share the memory of this process: nothing has to travel then."""
        subinterpreters = getattr(futures, "InterpreterPoolExecutor", ())
        shares = isinstance(self._executor, ThreadPoolExecutor | DaemonThreads)
        return self._executor if shares and not isinstance(self._executor, subinterpreters) else None

    @property
    def is_remote(self) -> bool:
        """Whether there is an executor whose workers do not."""
        return self._executor is not None and self.threads is None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a call in a worker.

        Args:
            function: Raises nothing itself.
            *args: Its arguments.

        Raises:
            Stopped: Nobody waits for it any more (`current_stop`), and it was withdrawn.
            WorkerLostError: Its worker was lost, and another one may answer.
            ExecutorBrokenError: The executor makes no more calls.
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
                # Dask's futures do not say which calls are under way; its workers are told (`tell`).
                if unwanted() and not hasattr(executor, "_client"):
                    future.cancel()  # unless it has begun: what is paid for is waited for
                wait([future], SLICE)
        finally:
            self._pending.discard(future)
        if future.cancelled() and unwanted():
            raise Stopped
        failed = CancelledError() if future.cancelled() else future.exception()
        if failed is not None:
            raise self._lost(executor, failed, isinstance(failed, BrokenExecutor)) from failed
        return future.result()

    def tell(self, function: Callable[..., T], *args: Any) -> list[T]:
        """What a call in every worker there is now returns, where the executor can do that: Dask's can."""
        client: Any = getattr(self._executor, "_client", None)
        if not hasattr(client, "run"):
            return []
        try:
            told = client.run(function, *args, on_error="return")
        except Exception:  # noqa: BLE001 - a cluster that is not there; who lacks something will say so
            return []
        return [said for said in told.values() if not isinstance(said, BaseException)]

    def _lost(self, executor: Executor, error: BaseException, is_broken: bool) -> Exception:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        if not is_broken:
            return WorkerLostError(f"A worker of the executor was lost ({said}).")
        if self._make is None:
            return ExecutorBrokenError(
                f"The executor takes no more calls ({said}). Give a callable that makes one, as in "
                f"{_FACTORY}: another one is made when it breaks."
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
    """Closes an executor; processes of which one ``hangs`` would hold up the interpreter's end."""
    processes = dict(getattr(executor, "_processes", None) or {}) if hangs else {}
    try:
        executor.shutdown(wait=False, cancel_futures=True)
    except TypeError:  # Dask's has no such argument
        executor.shutdown(wait=False)
    for process in processes.values():
        process.terminate()


class RemoteScore:
    """``score(params, example)``, computed by a worker that shares no memory with this process.

    The score travels to a worker once, and whenever one says that it lacks it. What a call used is
    recorded here; what it raised is raised here.

    Args:
        place: Where the workers are.
        score: The score.
        parts: What it is made of, by name: what cannot travel is named in the error.
        timeout: Seconds after which a call is given up.
        stopped: Set when no call is wanted any more.
    """

    def __init__(
        self,
        place: Workplace,
        score: Score,
        parts: Mapping[str, Any],
        timeout: float | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        self._place = place
        self._payload = pack(score, parts)
        self._parts = parts
        self._timeout = timeout
        self._stopped = stopped or threading.Event()
        self._over = threading.Event()
        self._key = uuid.uuid4().hex
        self._numbers = itertools.count()

    def __enter__(self) -> RemoteScore:
        """Sends the score to a worker, or to all of them, before it is needed.

        Raises:
            TravelError: It cannot be used there; the message names the part.
            ExecutorBrokenError: The executor runs nothing.
        """
        told = self._place.tell(worker.hold, self._key, self._payload)
        said = told or [self._ask(self._key, self._payload)]
        wrong = next((answer for answer in said if answer is not None), None)
        if wrong is not None:
            raise self._unreadable(wrong)
        if told:
            in_daemon(self._tell_stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._over.set()

    def __call__(self, params: dict[str, int], example: int) -> float:
        """The score of a configuration on an example."""
        call = self._key, params, example, self._timeout, next(self._numbers)
        answer = self._place.run(worker.perform, *call) or self._place.run(
            worker.perform, *call, self._payload
        )
        assert answer is not None
        score, packed, usage = answer
        record(usage)
        if score is not None:
            return score
        assert packed is not None
        error = unpack_error(packed)
        if isinstance(error, Stopped) and self._timeout is not None and not self._stopped.is_set():
            raise CallTimeoutError(f"no answer within {self._timeout:g} s")
        raise error

    def _tell_stop(self) -> None:
        """Tells all workers when nothing is to begin any more, and when the score is needed no more."""
        while not self._over.wait(SLICE):
            if self._stopped.is_set():
                self._place.tell(worker.stop, self._key)
                self._over.wait()
        self._place.tell(worker.stop, self._key, True)

    def _ask(self, key: str | None, payload: bytes) -> str | None:
        """Has a worker unpack something; awaited where an interrupt may come."""
        try:
            return result_of(in_daemon(partial(self._place.run, worker.hold, key, payload)))
        except (WorkerLostError, ExecutorBrokenError) as error:
            raise ExecutorBrokenError(
                f"The executor's workers cannot run m-promptune: {error} It has to be installed where they "
                "run; a script that starts processes needs `if __name__ == '__main__':`. No call was made."
            ) from error

    def _unreadable(self, wrong: str) -> Exception:
        for name, part in self._parts.items():
            said = self._ask(None, pack(part, {}))
            if said is not None:
                return cannot_travel(name, said)
        return cannot_travel("the score", wrong)


@contextmanager
def measuring(
    score: Score,
    place: Workplace,
    num_threads: int,
    retry: RetryPolicy | None,
    stopped: threading.Event,
) -> Iterator[tuple[Score, Executor]]:
    """The score as it is to be called, and the executor of this process that calls it.

    That is the given one where it shares this process's memory. Otherwise it is threads, which are
    closed without waiting for a call that hangs; those of a remote score do nothing but wait.
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
            with RemoteScore(place, score, {"the score": score}, timeout, stopped) as remote:
                yield remote, pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
