"""DSPy's own methods of its first steps: what their arguments mean, and calls of them as they are."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import dspy

from mpromptune.execution.pool import in_time

logger = logging.getLogger(__name__)


def bind(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return dict(inspect.signature(stock).bind(*args, **kwargs).arguments)


def serially(step: str, stock: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Runs a step as DSPy does, with a warning."""
    logger.warning("The %s step of DSPy %s is not known; running it serially.", step, dspy.__version__)
    bound = inspect.signature(stock).bind_partial()
    bound.arguments.update(given)
    return in_time(partial(stock, *bound.args, **bound.kwargs))
