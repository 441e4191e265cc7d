"""What goes from one process to another: objects, and errors with their types, attributes and causes."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping
from typing import Any

import cloudpickle

from mpromptune.errors import TravelError, causes


def pack(whole: Any, parts: Mapping[str, Any]) -> bytes:
    """An object as bytes.

    Args:
        whole: The object.
        parts: What it is made of, by the names that an error is to call it.

    Raises:
        TravelError: It cannot be pickled; the message names the part, and what it says of it.
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


def unpack(packed: bytes) -> Any:
    """The object again."""
    return pickle.loads(packed)


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
    return pickle.dumps(([_pack_link(link) for link in causes(error)], text))


def unpack_error(packed: bytes) -> Exception:
    """The error again, of the same type wherever that can be had; its last cause says where it was raised."""
    links, text = pickle.loads(packed)
    errors = [_rebuilt(*pickle.loads(link)) for link in links]
    for error, cause in zip(errors, [*errors[1:], RemoteError(text)], strict=True):
        error.__cause__ = cause
    first: Exception = errors[0]
    return first


_Link = tuple[Any, tuple[Any, ...], dict[str, Any]]  # what `_rebuilt` takes


def _pack_link(error: BaseException) -> bytes:
    """Type, arguments and attributes: constructors of SDKs' errors take what pickle does not give them."""
    cls, text = type(error), _text(error)
    args = tuple(arg if _travels(arg) else repr(arg) for arg in error.args)
    state = {name: value for name, value in vars(error).items() if _travels(value)}
    whole: _Link = None, (error,), state  # for Python's own errors that have other fields, which pickle knows
    named: _Link = (cls.__module__, cls.__qualname__), (text,), state
    found = (packed for link in ((cls, args, state), whole) if (packed := _packed(link, text)) is not None)
    return next(found, bytes(cloudpickle.dumps(named)))


def _packed(link: _Link, text: str) -> bytes | None:
    """What an error is rebuilt from as bytes, if it then says the same."""
    try:
        packed = bytes(cloudpickle.dumps(link))
        return packed if _text(_rebuilt(*pickle.loads(packed))) == text else None
    except Exception:  # noqa: BLE001 - whatever pickling it, or making it, raises
        return None


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a `__str__` that needs what did not travel
        return f"<{type(error).__name__}>"


def _travels(value: Any) -> bool:
    try:
        pickle.loads(cloudpickle.dumps(value))
    except Exception:  # noqa: BLE001 - there are as many as there are classes
        return False
    return True


def _rebuilt(cls: Any, args: tuple[Any, ...], state: Mapping[str, Any]) -> Any:
    """An error of a class, or of one of the same name where that cannot be had.

    Only constructors of Python's own errors are called: they take what is in ``args``.
    """
    if cls is None:
        vars(args[0]).update(state)
        return args[0]
    if isinstance(cls, tuple):
        module, name = cls
        cls = type(name, (Exception,), {"__module__": module})
    error = cls(*args) if cls.__module__ == "builtins" else cls.__new__(cls, *args)
    error.args = args
    vars(error).update(state)
    return error
