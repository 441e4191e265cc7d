"""The arguments of MIPROv2 and of `search`: their own and the options of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mpromptune.engine.options import (
    ADAPTIVE_ONLY,
    OPTION_NAMES,
    QEI_ONLY,
    SEARCH_OPTIONS,
    SearchOptions,
)
from mpromptune.errors import InvalidArgumentError, UnknownOptionError, nearest, unknown

F = TypeVar("F", bound=Callable[..., Any])

# Where users read about all options.
_ALL = "help(mpromptune.engine.options.SearchOptions)"


def extending(stock: inspect.Signature) -> Callable[[F], F]:
    """Declare DSPy's parameters and our options in the signature, which BetterTogether inspects."""

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


def with_options(function: F) -> F:
    """Declare the options of `search` in its signature, in place of ``**options``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in SEARCH_OPTIONS.items()
    ]
    function.__dict__["__signature__"] = signature.replace(parameters=[*own, *options])
    return function


def split(
    kwargs: Mapping[str, Any], stock: inspect.Signature, elsewhere: Mapping[str, inspect.Signature]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options and DSPy's arguments; some names are both.

    Args:
        kwargs: What was given.
        stock: The signature of DSPy's method.
        elsewhere: Signatures of DSPy's other methods by name, whose arguments may have been meant.

    Raises:
        UnknownOptionError: A name is neither.
    """
    own = [*OPTION_NAMES, *(n for n in stock.parameters if n not in ("self", "student"))]
    for name in kwargs:
        if name in own:
            continue
        for method, signature in elsewhere.items():
            if name in signature.parameters:
                raise UnknownOptionError(f"{name!r} is an argument of {method}: pass it there.")
            near = nearest(name, {*own, *signature.parameters})
            if near is not None and near not in own:
                raise UnknownOptionError(
                    f"Unknown option {name!r}. Did you mean {near!r}, an argument of {method}?"
                )
        raise UnknownOptionError(unknown("option", name, own, _ALL))
    ours = {k: v for k, v in kwargs.items() if k in OPTION_NAMES}
    return ours, {k: v for k, v in kwargs.items() if k in stock.parameters}


def gather(*sources: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge options given in several places of one call; None means not given.

    Raises:
        InvalidArgumentError: The same option is given twice, or a source is not a mapping.
        UnknownOptionError: A name is not an option.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        if source is not None and not isinstance(source, Mapping):
            raise InvalidArgumentError(f"sampler_config must be a dict of options; got {source!r}.")
        for key, value in (source or {}).items():
            if key not in OPTION_NAMES:
                raise UnknownOptionError(unknown("option", key, OPTION_NAMES, _ALL))
            if value is None:
                continue
            if key in merged:
                raise InvalidArgumentError(f"{key!r} is given twice: {merged[key]!r} and {value!r}.")
            merged[key] = value
    return merged


def resolve(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SearchOptions | None:
    """The options of a compile; None if no option requires our search, so that DSPy's own search runs.

    ``n_jobs`` and ``verbose`` alone do not require it: the first has no meaning for DSPy's serial loop, and
    the second is also an argument of DSPy. Default options that apply only to ``"qei"`` are dropped when
    another sampler is given; those that apply only to adaptive proposals, when fixed ones are given.
    """
    sampler, dropped = given.get("sampler", "qei"), set[str]()
    if not isinstance(sampler, str) or sampler.lower() != "qei":
        dropped.update(QEI_ONLY)
    if given.get("proposals") == "fixed":
        dropped.update(ADAPTIVE_ONLY)
    defaults = {key: value for key, value in defaults.items() if key not in dropped}
    merged = {**defaults, **given}
    options = SearchOptions(**merged)
    silent = {"n_jobs", "verbose"} if options.dry_run else {"n_jobs", "verbose", "dry_run"}
    return options if set(merged) - silent else None
