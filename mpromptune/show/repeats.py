"""Warnings that are repeated during a compile appear once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from mpromptune.model.shared import Shared, message_of

# The libraries whose warnings are compared. They log from many modules, so filters are on handlers.
_LIBRARIES = ("dspy", "mpromptune")


class _Seen:
    """Decides which warnings are new; any thread may ask.

    Attributes:
        is_over: From then on, all warnings count as new.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._seen: dict[Hashable, object] = {}

    def is_new(self, *warning: Hashable) -> bool:
        """Whether it is the first time that this is asked."""
        mine = object()  # of several threads, one gets its own object back
        return self._seen.setdefault(warning, mine) is mine or self.is_over

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record of the log."""
        is_compared = record.levelno == logging.WARNING and record.name.split(".")[0] in _LIBRARIES
        return not is_compared or self.is_new(record.name, message_of(record))


@contextmanager
def _once() -> Iterator[None]:
    """Compare the warnings of the log and those of Python from here on; all is as before in the end."""
    handlers = {handler for name in (*_LIBRARIES, None) for handler in logging.getLogger(name).handlers}
    if logging.lastResort is not None:  # shows warnings where no handler was set up
        handlers.add(logging.lastResort)
    # One for each handler, because a record may reach several.
    filters = {handler: _Seen().filter for handler in handlers}
    seen, show = _Seen(), warnings.showwarning

    def show_once(message: Any, category: Any, filename: str, lineno: int, *more: Any, **named: Any) -> None:
        if seen.is_new(str(message), category, filename, lineno):
            show(message, category, filename, lineno, *more, **named)

    for handler, test in filters.items():
        handler.addFilter(test)
    warnings.showwarning = show_once
    try:
        yield
    finally:
        seen.is_over = True
        if warnings.showwarning is show_once:  # otherwise it was replaced, and may be put back later
            warnings.showwarning = show
        for handler, test in filters.items():
            handler.removeFilter(test)


# A context in which they do; nested and concurrent ones count as one.
repeats_hidden = Shared(_once)
