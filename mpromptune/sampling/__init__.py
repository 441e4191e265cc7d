"""Samplers: qEISampler, and Optuna's samplers adapted to a search; their names are known without torch."""

from typing import Any

from mpromptune.errors import InvalidArgumentError, nearest

SAMPLER_NAMES = ("qei", "tpe", "gp", "random")


def unknown_sampler(given: Any) -> InvalidArgumentError:
    """The error for a sampler that is neither a known name nor an Optuna sampler."""
    near = nearest(given, SAMPLER_NAMES)
    return InvalidArgumentError(
        f"sampler must be one of {list(SAMPLER_NAMES)} or an optuna BaseSampler; got {given!r}."
        + (f" Did you mean {near!r}?" if near else "")
    )
