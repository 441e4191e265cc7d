"""Scores that travel to other processes, and write down there what they are asked.

Workers import this: it needs neither DSPy nor torch.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from mpromptune import Noted
from mpromptune.execution.notes import attach_note

N = 30
TEXTS = {"0_predictor_instruction": ["a", "aa", "aaa", "aaaa"], "0_predictor_demos": [[], ["abc"], ["xyz"]]}
INSTRUCTION, DEMOS = TEXTS


def value(params: dict[str, int], example: int) -> float:
    """A score that is 1 the more often the higher the indices."""
    chance = 0.3 + 0.1 * params[INSTRUCTION] + 0.05 * params[DEMOS]
    asked = f"{params[INSTRUCTION]} {params[DEMOS]} {example}"
    return float(int(hashlib.sha256(asked.encode()).hexdigest()[:12], 16) % 1000 < 1000 * chance)


def noted(params: dict[str, int], example: int) -> float:
    """`value` with a note; a third of the examples fail with one."""
    if example % 3:
        return Noted(value(params, example), ["of", example])
    error = ValueError("no answer")
    attach_note(error, ["of", example])
    raise error


def write(log: Path, line: str) -> None:
    """One line, whoever else writes at the same time."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def written(log: Path, what: str) -> Counter[str]:
    """How often each line that begins so was written."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.removeprefix(f"{what} ") for line in lines if line.startswith(f"{what} "))


def is_first(marker: Path) -> bool:
    """Whether nobody has asked that before, of several processes that may do so at the same moment."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def kill_worker(marker: Path) -> None:
    """Kills the process that runs this, once; never that of the tests."""
    if is_first(marker):
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), signal.SIGKILL)


class Written:
    """`value`, with a line in a file as each call starts and ends.

    Args:
        log: The file.
        dies: So many lines later, the worker is killed in mid-call.
        latency: Seconds of a call.
    """

    def __init__(self, log: Path, dies: int | None = None, latency: float = 0.0) -> None:
        self.log, self.dies, self.latency = log, dies, latency

    def __call__(self, params: dict[str, int], example: int) -> float:
        call = f"{params[INSTRUCTION]} {params[DEMOS]} {example}"
        write(self.log, f"start {call}")
        write(self.log, f"by {os.getpid()}")
        if self.dies is not None and len(self.log.read_text().splitlines()) >= self.dies:
            kill_worker(self.log.with_suffix(".killed"))
        time.sleep(self.latency)
        write(self.log, f"end {call}")
        return value(params, example)


class Raising:
    """`value`, but the first call on example 0 raises."""

    def __init__(self, log: Path, error: Exception) -> None:
        self.log, self.error = log, error

    def __call__(self, params: dict[str, int], example: int) -> float:
        write(self.log, f"start {example}")
        if example == 0 and is_first(self.log.with_name("raised")):
            raise self.error
        return value(params, example)


class Distant(Executor):
    """Threads that behave as other processes do: whatever comes and goes is pickled.

    Args:
        number: Calls at a time.
    """

    def __init__(self, number: int = 4) -> None:
        self._room = threading.Semaphore(number)
        self.sent = 0  # bytes
        self.futures: list[Future] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        packed = pickle.dumps((fn, args, kwargs))
        self.sent += len(packed)
        future: Future = Future()
        self.futures.append(future)
        threading.Thread(target=self._run, args=(future, packed), name="Distant", daemon=True).start()
        return future

    def _run(self, future: Future, packed: bytes) -> None:
        with self._room:
            if not future.set_running_or_notify_cancel():
                return
            fn, args, kwargs = pickle.loads(packed)
            try:
                future.set_result(pickle.loads(pickle.dumps(fn(*args, **kwargs))))
            except Exception as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)


class HangingOnce(Written):
    """`Written`, but the first call on example 0 never comes back."""

    def __call__(self, params: dict[str, int], example: int) -> float:
        if example == 0 and is_first(self.log.with_suffix(".hangs")):
            threading.Event().wait()
        return super().__call__(params, example)
