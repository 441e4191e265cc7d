"""Calls that are waited for come before those that only fill idle workers."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from mpromptune.calls.priority import Priority


class AtOnce(Executor):
    """Runs a call where it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_idle_workers_only() -> None:
    """One worker makes the calls that are waited for first, though another came before them."""
    order: list[str] = []
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        queue: Priority[None] = Priority(pool, 1)
        first = queue.submit(lambda: (gate.wait(5), order.append("first"))[1])
        filler = queue.submit(lambda: order.append("filler"), idle=True)
        second = queue.submit(lambda: order.append("second"))
        gate.set()
        for future in (first, second, filler):
            future.result(timeout=5)
    assert order == ["first", "second", "filler"]


def test_two_workers_share() -> None:
    """While one worker is busy, the other one takes what is there for idle ones."""
    gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        queue: Priority[bool] = Priority(pool, 2)
        busy = queue.submit(lambda: gate.wait(5))
        assert queue.submit(gate.is_set, idle=True).result(timeout=5) is False
        gate.set()
        assert busy.result(timeout=5)


def test_calls_that_end_at_once() -> None:
    """Thousands of them are no deep recursion."""
    queue: Priority[int] = Priority(AtOnce(), 1)
    assert [queue.submit(lambda i=i: i, idle=True).result() for i in range(3000)] == list(range(3000))


def test_errors_and_cancellation() -> None:
    """A filler raises what its call raised; one that was cancelled before its turn is never made."""
    gate, made = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        queue: Priority[Any] = Priority(pool, 1)
        queue.submit(lambda: gate.wait(5))
        cancelled, failing = queue.submit(lambda: made.append(1), idle=True), queue.submit(_fail, idle=True)
        assert cancelled.cancel()
        gate.set()
        with pytest.raises(KeyError):
            failing.result(timeout=5)
    assert not made
    with pytest.raises(CancelledError):
        cancelled.result()


def _fail() -> None:
    raise KeyError("filler")
