"""The checks of single options: a value that is not valid gets an error that names it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

from mpromptune.errors import InvalidArgumentError, require_count, require_finite

# When the candidates of a compile are written: before the search, or also while it runs.
PROPOSALS = ("fixed", "adaptive")


def _check_embedder(name: str, value: Any) -> None:
    if not (isinstance(value, str) or callable(value) or hasattr(value, "encode")):
        raise InvalidArgumentError(
            "embedder must be a model name or path, a SentenceTransformer, a dspy.Embedder or a "
            f"callable; got {value!r}."
        )


def _check_device(name: str, value: Any) -> None:
    from mpromptune.model.devices import resolve_device  # it loads torch

    resolve_device(value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be True or False; got {value!r}.")


def _check_callbacks(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or not all(callable(callback) for callback in value):
        raise InvalidArgumentError(f"{name} must be a list of callables; got {value!r}.")


def _check_proposals(name: str, value: Any) -> None:
    if value not in PROPOSALS:
        raise InvalidArgumentError(f"proposals must be one of {[*PROPOSALS]}; got {value!r}.")


def _check_path(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise InvalidArgumentError(f"{name} must be the path of a file; got {value!r}.")


def _check_names_or_proposers(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a list: pass {name}=[{value!r}]; got {value!r}.")
    if not isinstance(value, Sequence) or not value:
        raise InvalidArgumentError(f"{name} must be a list of at least one name or proposer; got {value!r}.")


def _check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise InvalidArgumentError(f"{name} must be a callable; got {value!r}.")


def _check_grace(name: str, value: Any) -> None:
    if require_finite(name, value) < 0:
        raise InvalidArgumentError(f"{name} must be 0 or more; got {value!r}.")


def _check_timeout(name: str, value: Any) -> None:
    if require_finite(name, value) <= 0:
        raise InvalidArgumentError(f"{name} must be above 0; got {value!r}.")


def _check_prices(name: str, value: Any) -> None:
    rows = value.values() if isinstance(value, Mapping) else [None]
    if not callable(value) and not all(map(_is_price, rows)):
        raise InvalidArgumentError(
            "prices must map each model to (US dollars per million prompt tokens, completion tokens), or "
            f"be a callable of model and usage; got {value!r}."
        )


def _is_price(row: Any) -> bool:
    is_pair = isinstance(row, tuple | list) and len(row) == 2
    return is_pair and all(isinstance(x, Real) and 0.0 <= float(x) < math.inf for x in row)


_POSITIVE = (
    *("n_jobs", "batch_size", "max_space_size", "min_cold_start", "block_size", "max_calls", "patience"),
    *("max_requests_per_minute", "max_tokens_per_minute"),
)
# The check of each option: ``check(name, value)``; None is always valid.
CHECKS: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(_POSITIVE, require_count),
    **dict.fromkeys(("n_batches", "max_retries"), partial(require_count, least=0)),
    **dict.fromkeys(("failure_score", "target"), require_finite),
    **dict.fromkeys(("dry_run", "verbose"), _check_bool),
    "proposals": _check_proposals,
    "proposers": _check_names_or_proposers,
    "gains_file": _check_path,
    "embedder": _check_embedder,
    "device": _check_device,
    "callbacks": _check_callbacks,
    **dict.fromkeys(("on_progress", "instruction_proposer"), _check_callable),
    "grace": _check_grace,
    "timeout": _check_timeout,
    "prices": _check_prices,
}
