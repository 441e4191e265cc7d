"""Code that runs in a worker of another process, and the transport of scores and errors.

Errors are packed by own code: pickle cannot call the constructors of many SDKs' errors, and the verdict on an
error depends on its type, its attributes and its causes.
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

# NOTE: number of scores that a worker holds; the least recently used one is dropped first. Each search that
# uses the worker needs one.
_MOST = 8

# The score of a call, or its packed error; and its usage.
Answer = tuple[float | None, bytes | None, Usage]

_LOCK = threading.Lock()
_HELD: OrderedDict[str, tuple[Score, threading.Event]] = OrderedDict()  # the event is set to stop its calls


def hold(key: str | None, payload: bytes) -> str | None:
    """Unpack a score, and hold it if there is a key; return what is wrong with it, or None."""
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
    except Exception as error:  # noqa: BLE001 - unpickling may raise any error
        return f"{type(error).__name__}: {error}"
    return None


def stop(key: str, forget: bool = False) -> None:
    """Stop the calls of a score: none begins any more, and those in flight make no further LM calls."""
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
    """Make one call, whose answer is not needed after ``timeout`` seconds.

    An error of the call is part of the answer; an error raised by this function is one of the infrastructure.
    The answer is None if this worker lacks the score of the key and there is no payload. The number makes
    calls differ, because Dask runs equal calls only once.
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
        except (Exception, Stopped) as raised:  # noqa: BLE001 - the calling process judges it
            value, error = None, pack_error(raised)
    return value, error, meter.total


def _leave_interrupts_to_parent() -> None:
    """Ignore Ctrl-C, which a terminal also sends to child processes: their calls may use their grace."""
    is_child = multiprocessing.parent_process() is not None
    if is_child and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def pack(whole: Any, parts: Mapping[str, Any]) -> bytes:
    """An object as bytes.

    Raises:
        TravelError: It cannot be pickled; the message names the part that cannot.
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
    """The error for a part that cannot be sent to a worker of another process."""
    said = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
    return TravelError(
        f"{name[:1].upper()}{name[1:]} cannot be sent to the workers of the executor ({said}). Remove locks, "
        "open files and connections from it (`__getstate__`), define it in a module that the workers can "
        "import, or use threads. No call was made with it."
    )


class RemoteError(Exception):
    """The traceback of an error in the worker, as text; it is the last cause of the error raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(f'\n"""\n{text}"""')


def pack_error(error: BaseException) -> bytes:
    """An error with its causes as bytes, without the parts that cannot be pickled."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return pickle.dumps(([_pack_one(link) for link in causes(error)], text))


def unpack_error(packed: bytes) -> BaseException:
    """The error, of the same type if possible; its last cause is the traceback in the worker."""
    links, text = pickle.loads(packed)
    errors: list[BaseException] = [_rebuilt(*pickle.loads(link)) for link in links]
    for error, cause in zip(errors, [*errors[1:], RemoteError(text)], strict=True):
        error.__cause__ = cause
    return errors[0]


def _pack_one(error: BaseException) -> bytes:
    """An error as bytes, in the first way that keeps its text: pickled, or rebuilt from picklable parts.

    If neither keeps it, only its module, name and text are packed, which is enough to judge it by name.
    """
    cls, text = type(error), _try(lambda: str(error)) or ""
    state = {name: value for name, value in vars(error).items() if _is_picklable(value)}
    args = tuple(arg if _is_picklable(arg) else repr(arg) for arg in error.args)
    ways: Iterable[tuple[Any, ...]] = ((error, (), state), (cls, args, state))
    for way in ways:
        packed: bytes | None = _try(lambda way=way: cloudpickle.dumps(way))  # type: ignore[misc]
        if packed and _try(lambda packed=packed: str(_rebuilt(*pickle.loads(packed)))) == text:  # type: ignore[misc]
            return packed
    return bytes(cloudpickle.dumps(((cls.__module__, cls.__qualname__), (text,), state)))


def _rebuilt(what: Any, args: tuple[Any, ...], state: Mapping[str, Any]) -> BaseException:
    """Rebuild an error from itself, from its class, or from the name of its class.

    Only the constructors of built-in errors are called, because they accept ``args``.
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


def _is_picklable(value: Any) -> bool:
    return _try(lambda: (pickle.loads(cloudpickle.dumps(value)),)) is not None


def _try(call: Callable[[], Any]) -> Any:
    """The result of a call, or None if it raises any error, as pickling and constructors of errors may."""
    try:
        return call()
    except Exception:  # noqa: BLE001
        return None
