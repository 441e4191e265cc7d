"""What runs in a worker of another process: a score that is sent there once, and called there."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpromptune.execution.execution import as_score, check_stopped, stoppable
from mpromptune.execution.interrupts import Stopped, contained
from mpromptune.execution.travel import pack_error, unpack
from mpromptune.execution.usage import Meter, Usage, metered

# NOTE: scores that a worker holds, the least recently used of which makes room: one for each search
# that runs on it now, with some to spare.
_HELD = 8


@dataclass(frozen=True)
class Call:
    """One call of a score.

    Attributes:
        key: Of the score; every search has its own.
        params: The configuration.
        example: The example.
        timeout: Seconds after which nobody waits for it any more.
        number: Tells it from others: to Dask, equal calls are one.
        payload: The score itself, for a worker that has said that it lacks it.
    """

    key: str
    params: dict[str, int]
    example: int
    timeout: float | None = None
    number: int = 0
    payload: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a call.

    Attributes:
        score: Its score.
        error: What it raised, packed.
        usage: What it used.
        lacks: Whether the worker has never been sent the score; nothing was called.
        unreadable: What the worker cannot make of what it was sent; nothing was called.
        stopped: Whether it was cut short because nobody waits for it.
    """

    score: float | None = None
    error: bytes | None = None
    usage: Usage = field(default_factory=Usage)
    lacks: bool = False
    unreadable: str | None = None
    stopped: bool = False


class _Deadline(threading.Event):
    """Set by the clock."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._at = time.monotonic() + seconds

    def is_set(self) -> bool:
        return time.monotonic() >= self._at


@dataclass
class _Held:
    """A score, and whether its search is over."""

    score: Callable[[dict[str, int], int], Any]
    stopped: threading.Event = field(default_factory=threading.Event)


class _Shelf:
    """The scores that this process has been sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def find(self, key: str, payload: bytes | None) -> _Held | None:
        """The score of that key, unpacked by the first that needs it."""
        with self._lock:
            if key not in self._held and payload is not None:
                self._held[key] = _Held(unpack(payload))
            if key in self._held:
                self._held.move_to_end(key)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
            return self._held.get(key)

    def stop(self, key: str, forget: bool) -> None:
        with self._lock:
            held = self._held.pop(key, None) if forget else self._held.get(key)
        if held is not None:
            held.stopped.set()


_SHELF = _Shelf()


def receive(key: str, payload: bytes) -> str | None:
    """Keeps a score; what is wrong with it, if anything is."""
    try:
        _SHELF.find(key, payload)
    except Exception as error:  # noqa: BLE001 - whatever unpickling runs into
        return f"{type(error).__name__}: {error}"
    return None


def take(key: str, payload: bytes) -> str | None:
    """As `receive`, as the first call of a search."""
    _leave_interrupts_to_parent()
    return receive(key, payload)


def read(packed: bytes) -> str | None:
    """What is wrong with a part of a score, if anything is."""
    try:
        unpack(packed)
    except Exception as error:  # noqa: BLE001 - whatever unpickling runs into
        return f"{type(error).__name__}: {error}"
    return None


def stop(key: str, forget: bool = False) -> None:
    """No call of that score begins any more, nor does one under way ask an LM again."""
    _SHELF.stop(key, forget)


def perform(call: Call) -> Answer:
    """One call. What it raises is part of the answer: an error of this function is the infrastructure's."""
    _leave_interrupts_to_parent()
    if call.payload is not None and (wrong := receive(call.key, call.payload)) is not None:
        return Answer(unreadable=wrong)
    held = _SHELF.find(call.key, None)
    if held is None:
        return Answer(lacks=True)
    events = [held.stopped] if call.timeout is None else [held.stopped, _Deadline(call.timeout)]
    with metered(Meter()) as meter, stoppable(*events):
        answer = _answer(held, call)
    return Answer(answer.score, answer.error, meter.total, stopped=answer.stopped)


def _answer(held: _Held, call: Call) -> Answer:
    try:
        check_stopped()
        return Answer(as_score(contained(held.score, call.params, call.example)))
    except Stopped:
        return Answer(stopped=True)
    except Exception as error:  # noqa: BLE001 - judged where the call came from
        return Answer(error=pack_error(error))


def _leave_interrupts_to_parent() -> None:
    """Ctrl-C in a terminal reaches child processes too, whose calls are to be left their grace."""
    is_child = multiprocessing.parent_process() is not None
    if is_child and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
