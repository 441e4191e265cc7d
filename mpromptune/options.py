"""The options that MIPROv2 takes beside DSPy's own: names, defaults, and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from optuna.samplers import BaseSampler

from mpromptune.errors import InvalidArgumentError, UnknownOptionError

SAMPLER_NAMES = ("qei", "tpe", "gp", "random")
_QEI_ONLY = ("max_space_size", "n_batches", "min_cold_start", "embedder")


@dataclass(frozen=True)
class SearchOptions:
    """How the search step of `MIPROv2.compile` is run.

    Attributes:
        sampler: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"`` (any case) or an Optuna sampler.
        n_jobs: Multiplies ``num_threads``: so many times as many program calls in flight.
        batch_size: Configurations per round; by default enough to occupy all threads.
        max_space_size: (qei) Spaces of up to this size are enumerated at every proposal.
        n_batches: (qei) Random joint batches that compete with the greedy one.
        min_cold_start: (qei) Finished trials before the first model.
        embedder: (qei) Model name or path, SentenceTransformer, dspy.Embedder or callable.
        block_size: Validation examples per trial (default 10).
        max_calls: Program calls to spend; by default exactly what DSPy's MIPROv2 would.
        confirm: Keep calls back so that winner and baseline end fully measured.
        failure_score: What an example scores when the candidate itself fails on it.
        storage: Optuna storage or its URL; by default memory.
        study_name: Name of the study in the storage.
        callbacks: Called as ``callback(study, trial)`` after every trial.
    """

    sampler: BaseSampler | str = "qei"
    n_jobs: int = 1
    batch_size: int | None = None
    max_space_size: int | None = None
    n_batches: int | None = None
    min_cold_start: int | None = None
    embedder: Any = None
    block_size: int | None = None
    max_calls: int | None = None
    confirm: bool = True
    failure_score: float = 0.0
    storage: Any = None
    study_name: str | None = None
    callbacks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        self._check_sampler()
        for name in ("n_jobs", "batch_size", "block_size", "max_calls"):
            _check_positive(name, getattr(self, name))

    def _check_sampler(self) -> None:
        if isinstance(self.sampler, BaseSampler):
            name = type(self.sampler).__name__
        elif isinstance(self.sampler, str) and self.sampler.lower() in SAMPLER_NAMES:
            name = self.sampler.lower()
        else:
            raise InvalidArgumentError(
                f"sampler must be one of {list(SAMPLER_NAMES)} or an optuna BaseSampler; "
                f"got {self.sampler!r}."
            )
        given = [key for key in _QEI_ONLY if getattr(self, key) is not None]
        if given and name != "qei":
            raise InvalidArgumentError(
                f"{given} only apply to sampler='qei'; got sampler {name!r}. Set them on the sampler itself."
            )

    @property
    def qei_arguments(self) -> dict[str, Any]:
        """What was given of qEISampler's arguments."""
        names = (*_QEI_ONLY, "batch_size")
        return {key: value for key in names if (value := getattr(self, key)) is not None}


OPTION_NAMES = tuple(field.name for field in fields(SearchOptions))


def gather(*sources: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merges options given in several places of one call.

    Raises:
        InvalidArgumentError: The same option is given twice.
        UnknownOptionError: A name is not an option.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        for key, value in (source or {}).items():
            if key not in OPTION_NAMES:
                raise unknown_option(key)
            if key in merged:
                raise InvalidArgumentError(f"{key!r} is given twice: {merged[key]!r} and {value!r}.")
            merged[key] = value
    return merged


def resolve(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SearchOptions | None:
    """The options in force; None when nothing asks for a sampler, which means DSPy's own search.

    ``n_jobs`` alone asks for nothing: it has no meaning for DSPy's serial loop.
    """
    merged = {key: value for key, value in {**defaults, **given}.items() if value is not None}
    if not set(merged) - {"n_jobs"}:
        return None
    return SearchOptions(**merged)


def unknown_option(name: str, others: Sequence[str] = ()) -> UnknownOptionError:
    """The error for a name that is neither ours nor DSPy's."""
    valid = sorted({*OPTION_NAMES, *others})
    return UnknownOptionError(f"Unknown option {name!r}. Valid options are: {', '.join(valid)}.")


def _check_positive(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise InvalidArgumentError(f"{name} must be a positive integer; got {value!r}.")
