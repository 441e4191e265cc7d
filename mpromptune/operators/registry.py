"""The operators by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpromptune.engine.proposers import Proposer, check_proposers
from mpromptune.errors import InvalidArgumentError, unknown
from mpromptune.operators.base import Setting
from mpromptune.operators.demos import Demos
from mpromptune.operators.fresh import Fresh
from mpromptune.operators.guards import Guarded
from mpromptune.operators.reflect import Reflect
from mpromptune.operators.rewrite import Contrast, Merge, Shorten

Operator = Callable[[Setting], Proposer]

OPERATORS: dict[str, Operator] = {cls.name: cls for cls in (Reflect, Contrast, Fresh, Merge, Shorten, Demos)}


def register(name: str, operator: Operator) -> None:
    """Make an operator known by name.

    Args:
        name: Its name in ``proposers=[...]``; a known one is replaced.
        operator: Makes the proposer, which has the same name, from the `Setting` of a compile.

    Raises:
        InvalidArgumentError: The name is no text, or the operator cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"The name of a proposer must be a text that is not empty; got {name!r}.")
    if not callable(operator):
        raise InvalidArgumentError(
            f"register needs a class or function that makes a proposer from a Setting; got {operator!r}."
        )
    OPERATORS[name] = operator


def made(operators: Sequence[str | Proposer], setting: Setting) -> list[Proposer]:
    """The proposers of a compile; what they propose is checked (see `Guarded`).

    Args:
        operators: Names of operators, or proposers.
        setting: The compile.

    Raises:
        InvalidArgumentError: A name is unknown, an object is no proposer, or two have the same name.
    """
    proposers = [_made(operator, setting) for operator in operators]
    check_proposers(proposers)
    return [Guarded(proposer, setting) for proposer in proposers]


def _made(operator: Any, setting: Setting) -> Any:
    if isinstance(operator, type):
        raise InvalidArgumentError(
            f"proposers has {operator!r}, a class: register it (mpromptune.operators.registry.register) and "
            "pass its name, or pass an object."
        )
    if not isinstance(operator, str):
        return operator
    if operator not in OPERATORS:
        raise InvalidArgumentError(unknown("proposer", operator, OPERATORS))
    return OPERATORS[operator](setting)
