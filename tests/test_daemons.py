"""A pool whose threads hold nothing up."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from faults import press_ctrl_c

from mpromptune.execution.interrupts import handled
from mpromptune.execution.pool import DaemonThreads


def fail(error: BaseException) -> None:
    raise error


def test_calls_run_at_the_same_time_in_so_many_threads() -> None:
    """Three calls that wait for each other get through in a pool of three, which errors cost no thread."""
    pool, barrier = DaemonThreads(3), threading.Barrier(3)
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            pool.submit(fail, error).result(60)
    futures = [pool.submit(barrier.wait, 60) for _ in range(3)]
    assert sorted(future.result(60) for future in futures) == [0, 1, 2]
    pool.shutdown()


def test_what_has_not_begun_can_be_cancelled() -> None:
    """At shutdown the call under way ends as it may; the queue does not run."""
    pool, began, release = DaemonThreads(1), threading.Event(), threading.Event()

    def call() -> str:
        began.set()
        return "released" if release.wait(60) else "not released"

    first, second = pool.submit(call), pool.submit(lambda: "never")
    assert began.wait(60)
    pool.shutdown(wait=False, cancel_futures=True)
    assert second.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(lambda: None)
    pool.join(timeout=0.01)  # which comes back, although the call does not
    release.set()
    assert first.result(60) == "released"
    pool.shutdown()


def test_a_hanging_call_does_not_hold_up_the_interpreter() -> None:
    """A process ends with one of its pool's calls still waiting for ever."""
    code = (
        "import threading\nfrom mpromptune.execution.pool import DaemonThreads\n"
        "pool, began = DaemonThreads(2), threading.Event()\n"
        "pool.submit(lambda: (began.set(), threading.Event().wait()))\n"
        "began.wait()\npool.shutdown(wait=False)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_interrupt_while_a_thread_begins_holds_up_no_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is one of the pool's, and is told to end like the others."""
    pool, start = DaemonThreads(2), threading.Thread.start

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        press_ctrl_c()

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted_start)
        with handled(), pytest.raises(KeyboardInterrupt):
            pool.submit(lambda: None)
    assert pool.submit(lambda: 3).result(60) == 3
    pool.shutdown(wait=False)
    pool.join(timeout=60)
    assert not [t for t in threading.enumerate() if t.name.startswith("mpromptune_")]
