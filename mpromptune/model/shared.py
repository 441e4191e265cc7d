"""Settings of the whole process that several threads want for a while, and filters of its log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType


class Shared:
    """A context of the whole process: the first thread to enter opens it, and the last to leave closes it.

    Args:
        make: Makes the context that is opened and closed.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make, self._lock, self._users = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._open = self._make()
                self._open.__enter__()
            self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._open.__exit__(None, None, None)


def message_of(record: logging.LogRecord) -> str:
    """The message of a record for a filter; of a record that cannot be formatted, only its pattern.

    The handler then reports the error; one in a filter would end the call that logs.
    """
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - the objects in a record may raise anything
        return record.msg if isinstance(record.msg, str) else ""
