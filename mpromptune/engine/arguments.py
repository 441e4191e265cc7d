"""The arguments of MIPROv2: DSPy's own, and our options beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mpromptune.engine.options import OPTION_NAMES, unknown_option

F = TypeVar("F", bound=Callable[..., Any])


def extending(stock: inspect.Signature) -> Callable[[F], F]:
    """Declares DSPy's parameters and ours, which is what callers such as BetterTogether inspect."""

    def declare(function: F) -> F:
        ours = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("sampler_config", *OPTION_NAMES)
            if name not in stock.parameters
        ]
        parameters = sorted([*stock.parameters.values(), *ours], key=lambda p: p.kind)
        function.__dict__["__signature__"] = stock.replace(parameters=parameters)
        return function

    return declare


def split(kwargs: Mapping[str, Any], stock: inspect.Signature) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options and DSPy's arguments, of which some are both; anything else is an error that lists them."""
    for name in kwargs:
        if name not in OPTION_NAMES and name not in stock.parameters:
            raise unknown_option(name, [n for n in stock.parameters if n not in ("self", "student")])
    ours = {k: v for k, v in kwargs.items() if k in OPTION_NAMES}
    return ours, {k: v for k, v in kwargs.items() if k in stock.parameters}
