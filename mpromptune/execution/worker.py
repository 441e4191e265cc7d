"""What runs in a worker of another process, and what travels there and back: scores, and errors.

Errors are packed by hand: constructors of SDKs' errors take what pickle does not give them, and the
verdict on an error depends on its type, its attributes and its causes.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cloudpickle

from mpromptune.errors import TravelError, causes
from mpromptune.execution.interrupts import Stopped, check_stopped, contained, stoppable
from mpromptune.execution.pool import Score, as_score
from mpromptune.execution.usage import Meter, Usage, metered

# NOTE: scores that a worker holds, the least recently used of which makes room: one for each search
# that runs on it now, with some to spare.
_MOST = 8

# A call's score, or what it raised, packed; and what it used.
Answer = tuple[float | None, bytes | None, Usage]

_LOCK = threading.Lock()
_HELD: OrderedDict[str, tuple[Score, threading.Event]] = OrderedDict()  # with what is set at a search's end


def hold(key: str | None, payload: bytes) -> str | None:
    """Unpacks a score and holds it, if there is a key; returns what is wrong with it, if anything is."""
    _leave_interrupts_to_parent()
    try:
        with _LOCK:
            if key in _HELD:
                return None
            score = pickle.loads(payload)
            if key is not None:
                _HELD[key] = score, threading.Event()
            while len(_HELD) > _MOST:
                _HELD.popitem(last=False)
    except Exception as error:  # noqa: BLE001 - whatever unpickling runs into
        return f"{type(error).__name__}: {error}"
    return None


def stop(key: str, forget: bool = False) -> None:
    """No call of that score begins any more, nor does one under way ask an LM again."""
    with _LOCK:
        held = _HELD.pop(key, None) if forget else _HELD.get(key)
    if held is not None:
        held[1].set()


def perform(
    key: str,
    params: dict[str, int],
    example: int,
    timeout: float | None,
    number: int,
    payload: bytes | None = None,
) -> Answer | None:
    """One call, of which nobody waits for the answer after ``timeout`` seconds.

    What it raises is part of the answer: an error of this function is the infrastructure's. It is None
    where this worker lacks the score of that key, and there is no payload with it. The number tells the
    call from others: to Dask, equal calls are one.
    """
    _leave_interrupts_to_parent()
    if payload is not None and (wrong := hold(key, payload)) is not None:
        return None, pack_error(cannot_travel("the score", wrong)), Usage()
    with _LOCK:
        if key not in _HELD:
            return None
        _HELD.move_to_end(key)
        score, stopped = _HELD[key]
    until = time.monotonic() + (float("inf") if timeout is None else timeout)
    with metered(Meter()) as meter, stoppable(stopped.is_set, lambda: time.monotonic() >= until):
        try:
            check_stopped()
            value, error = as_score(contained(score, params, example)), None
        except (Exception, Stopped) as raised:  # noqa: BLE001 - judged where the call came from
            value, error = None, pack_error(raised)
    return value, error, meter.total


def _leave_interrupts_to_parent() -> None:
    """Ctrl-C in a terminal reaches child processes too, whose calls are to be left their grace."""
    is_child = multiprocessing.parent_process() is not None
    if is_child and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def pack(whole: Any, parts: Mapping[str, Any]) -> bytes:
    """An object as bytes.

    Raises:
        TravelError: It cannot be pickled; the message names which of its parts cannot.
    """
    try:
        return bytes(cloudpickle.dumps(whole))
    except Exception as error:
        for name, part in parts.items():
            try:
                cloudpickle.dumps(part)
            except Exception as found:
                raise cannot_travel(name, found) from found
        raise cannot_travel("the score", error) from error


def cannot_travel(name: str, why: object) -> TravelError:
    """The error for a part that no worker of another process can be given."""
    said = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
    return TravelError(
        f"{name[:1].upper()}{name[1:]} cannot travel to the workers of the executor ({said}). Leave locks, "
        "open files and connections out of it (`__getstate__`), define it in a module that the workers can "
        "import, or use threads. No call was made with it."
    )


class RemoteError(Exception):
    """Where in the worker an error came from, as text: the last cause of what is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(f'\n"""\n{text}"""')


def pack_error(error: BaseException) -> bytes:
    """An error with all that it was raised from, as bytes; what of it cannot travel is left out."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return pickle.dumps(([_pack_one(link) for link in causes(error)], text))


def unpack_error(packed: bytes) -> BaseException:
    """The error again, of the same type wherever that can be had; its last cause says where it was raised."""
    links, text = pickle.loads(packed)
    errors: list[BaseException] = [_rebuilt(*pickle.loads(link)) for link in links]
    for error, cause in zip(errors, [*errors[1:], RemoteError(text)], strict=True):
        error.__cause__ = cause
    return errors[0]


def _pack_one(error: BaseException) -> bytes:
    """The first that comes back saying the same: the error as pickle has it, or made anew from what travels.

    Otherwise its module, its name and its text, for whoever judges errors by name.
    """
    cls, text = type(error), _try(lambda: str(error)) or ""
    state = {name: value for name, value in vars(error).items() if _travels(value)}
    args = tuple(arg if _travels(arg) else repr(arg) for arg in error.args)
    ways: Iterable[tuple[Any, ...]] = ((error, (), state), (cls, args, state))
    for way in ways:
        packed: bytes | None = _try(lambda way=way: cloudpickle.dumps(way))  # type: ignore[misc]
        if packed and _try(lambda packed=packed: str(_rebuilt(*pickle.loads(packed)))) == text:  # type: ignore[misc]
            return packed
    return bytes(cloudpickle.dumps(((cls.__module__, cls.__qualname__), (text,), state)))


def _rebuilt(what: Any, args: tuple[Any, ...], state: Mapping[str, Any]) -> BaseException:
    """An error from itself, from its class, or from the name of that.

    Only constructors of Python's own errors are called: they take what is in ``args``.
    """
    if isinstance(what, tuple):
        module, name = what
        what = type(name, (Exception,), {"__module__": module})
    error: BaseException = what
    if isinstance(what, type):
        error = what(*args) if what.__module__ == "builtins" else what.__new__(what, *args)
        error.args = args
    vars(error).update(state)
    return error


def _travels(value: Any) -> bool:
    return _try(lambda: (pickle.loads(cloudpickle.dumps(value)),)) is not None


def _try(call: Callable[[], Any]) -> Any:
    """What a call returns; None where it raises, as what is pickled, or made again, may do in any way."""
    try:
        return call()
    except Exception:  # noqa: BLE001
        return None
