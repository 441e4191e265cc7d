"""An Optuna study's trials as tensors: what was measured, on which examples, and what is running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.difficulty import LARGEST, as_matrix, difficulty_of, summarise
from mpromptune.model.embedding import FloatArray
from mpromptune.model.geometry import Geometry
from mpromptune.model.space import Row
from mpromptune.model.surrogate import Surrogate, fit
from mpromptune.studies.attributes import ABANDONED, EXAMPLES, N_EXAMPLES, PROPOSED, SCORES
from mpromptune.studies.ledger import Ledger

RowOf = Callable[[dict[str, object]], Row | None]

_MEASURED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class History:
    """What a study knows, for maximisation.

    Trials with scores by example are one observation for each configuration, its mean score over the
    validation set as far as they tell; other trials are one observation each.

    Attributes:
        train_X: ``n x (C + 1)`` candidate indices and the observation's index (-1: no scores by example).
        train_Y: ``n x 1`` values; negated for a study that minimises.
        train_Yvar: ``n x 1`` variances of each observation by itself, or None without scores by example.
        shared: ``n x r``, a root of their covariance through the examples' difficulty; or ``0 x 0``.
        trial_noise: Variance of a typical trial's estimate; None without scores by example.
        measured: Configuration to the examples that it was measured on.
        pending: Configurations of running trials.
        closed: Configurations with nothing left to measure.
        n_trials: Trials observed.
    """

    train_X: Tensor
    train_Y: Tensor
    train_Yvar: Tensor | None
    shared: Tensor
    trial_noise: float | None
    measured: dict[Row, set[int]]
    pending: tuple[Row, ...]
    closed: frozenset[Row]
    n_trials: int

    def __len__(self) -> int:
        return len(self.train_Y)


def proposed_params(trial: FrozenTrial) -> dict[str, object]:
    """The params of a trial, or those that a sampler handed to it and that it has yet to suggest."""
    return {**trial.system_attrs.get(PROPOSED, {}), **trial.params}


@plain_torch()
def read(study: Study, trials: Iterable[FrozenTrial], row_of: RowOf, num_components: int) -> History:
    """Turns trials into a History.

    Args:
        study: Their study, for its direction and the size of its validation set.
        trials: Any trials. COMPLETE ones are observations, as are the scores of FAIL ones that were told
            without some of theirs; PRUNED ones count as measured only; RUNNING ones are pending; other
            FAIL ones and WAITING ones are ignored.
        row_of: Params to index row, or None for a trial of another search space.
        num_components: C.
    """
    placed = [(t, row) for t in trials if (row := row_of(proposed_params(t))) is not None]
    complete = [(t, row) for t, row in placed if t.state == TrialState.COMPLETE]
    measured = _measured([(t, row) for t, row in placed if t.state in _MEASURED or _is_partly_told(t)])
    n_examples = study.user_attrs.get(N_EXAMPLES, 0)
    maximise = study.direction == StudyDirection.MAXIMIZE
    if complete and all(_has_scores(trial) for trial, _ in complete):
        known = n_examples or 1 + max(e for examples in measured.values() for e in examples)
        told = [(t, row) for t, row in placed if t.state == TrialState.COMPLETE or _is_partly_told(t)]
        seen = _configurations(told, maximise, known)
    else:
        seen = _trials_as_they_are(complete, maximise)
    return History(
        train_X=torch.tensor(seen.rows, dtype=torch.float64).reshape(len(seen.rows), num_components + 1),
        train_Y=torch.from_numpy(seen.values).unsqueeze(-1),
        train_Yvar=None if seen.variances is None else torch.from_numpy(seen.variances).unsqueeze(-1),
        shared=torch.from_numpy(seen.shared),
        trial_noise=seen.trial_noise,
        measured=measured,
        pending=tuple(row for t, row in placed if t.state == TrialState.RUNNING),
        closed=frozenset(row for row, examples in measured.items() if len(examples) >= n_examples),
        n_trials=len(complete),
    )


def _measured(finished: Sequence[tuple[FrozenTrial, Row]]) -> dict[Row, set[int]]:
    measured: dict[Row, set[int]] = {}
    for trial, row in finished:
        measured.setdefault(row, set()).update(trial.user_attrs.get(EXAMPLES, ()))
    return measured


@dataclass(frozen=True)
class _Observations:
    """The part of a History that the surrogate is fitted to."""

    rows: list[list[int]]
    values: FloatArray
    variances: FloatArray | None = None
    shared: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    trial_noise: float | None = None


def _trials_as_they_are(complete: Sequence[tuple[FrozenTrial, Row]], maximise: bool) -> _Observations:
    values = _finite(np.array([t.value for t, _ in complete], dtype=np.float64))
    return _Observations([[*row, -1] for _, row in complete], values if maximise else -values)


def _finite(values: FloatArray) -> FloatArray:
    """Clips infinite values to the finite ones' range, as Optuna's own GP sampler does.

    Where any is beyond what something is measured in, it stands for a failure: ranks take their place.
    """
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    clipped: FloatArray = np.clip(values, low, high)
    if max(high, -low) > LARGEST:
        return np.unique(clipped, return_inverse=True)[1].astype(np.float64)
    return clipped


def _configurations(
    complete: Sequence[tuple[FrozenTrial, Row]], maximise: bool, n_examples: int
) -> _Observations:
    """One observation for each configuration; an example that was answered twice counts once."""
    ledger = Ledger()
    for trial, row in complete:
        scores = np.array(trial.user_attrs[SCORES], dtype=np.float64) * (1.0 if maximise else -1.0)
        ledger.add(row, dict(zip(trial.user_attrs[EXAMPLES], scores.tolist(), strict=True)))
    rows = ledger.rows()
    scores = as_matrix([ledger.means(row) for row in rows], n_examples)
    difficulty = difficulty_of(scores)
    summary = summarise(scores, difficulty)
    told = [difficulty.information[list(trial.user_attrs[EXAMPLES])].sum() for trial, _ in complete]
    indexed = [[*row, i] for i, row in enumerate(rows)]
    return _Observations(indexed, summary.values, summary.own, summary.root, 1.0 / float(np.median(told)))


def _is_partly_told(trial: FrozenTrial) -> bool:
    """Whether errors cost it some of its scores; of an abandoned one, the trial that takes it up has them."""
    return trial.state == TrialState.FAIL and _has_scores(trial) and ABANDONED not in trial.user_attrs


def _has_scores(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get(SCORES)) and EXAMPLES in trial.user_attrs  # one may have been lost


def fit_history(history: History, geometries: Sequence[Geometry]) -> Surrogate:
    """The surrogate of everything observed; needs at least one observation."""
    return fit(history.train_X, history.train_Y, history.train_Yvar, geometries, history.shared)


class LastFit:
    """Surrogates over the same choices; a search and its sampler ask for the same one in turn.

    Args:
        geometries: Of the choices.
    """

    def __init__(self, geometries: Sequence[Geometry]) -> None:
        self._geometries = geometries
        self._last: tuple[History, Surrogate] | None = None

    @plain_torch()
    def of(self, history: History) -> Surrogate:
        """The surrogate of everything observed; fitted unless the last one was fitted to the same."""
        last = self._last
        if last is None or not _is_same(last[0], history):
            last = self._last = history, fit_history(history, self._geometries)
        return last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # it can be fitted again


def _is_same(one: History, other: History) -> bool:
    """Whether the surrogates of two histories are equal."""
    pairs = zip(_observations(one), _observations(other), strict=True)
    return all((a is b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _observations(history: History) -> tuple[Tensor | None, ...]:
    return history.train_X, history.train_Y, history.train_Yvar, history.shared
