"""What a caller higher up asks of the compile that a function of the user's performs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mpromptune.engine.options import SearchOptions
from mpromptune.mipro.estimate import Estimate


class Interceptor:
    """Told of a compile before its first LM call, and may end it by raising; this one does nothing.

    Attributes:
        options: Options that take the place of those given to the compile.
    """

    options: Mapping[str, Any] = {}

    def on_options(self, options: SearchOptions | None) -> None:
        """The options in force; None for DSPy's own search, of which nothing else is said."""

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        """What the whole compile would take."""


_NONE = Interceptor()
_INTERCEPTOR: ContextVar[Interceptor] = ContextVar("mpromptune_interceptor", default=_NONE)


def interceptor() -> Interceptor:
    """That of this context."""
    return _INTERCEPTOR.get()


@contextmanager
def intercepting(own: Interceptor) -> Iterator[None]:
    """Every compile in this context is told to ``own``."""
    token = _INTERCEPTOR.set(own)
    try:
        yield
    finally:
        _INTERCEPTOR.reset(token)
