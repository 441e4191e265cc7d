"""An Optuna study's trials as tensors: what was measured, on which examples, and what is running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from mpromptune.attributes import EXAMPLES, N_EXAMPLES, PROPOSED, SCORES
from mpromptune.embedding import FloatArray
from mpromptune.geometry import Geometry
from mpromptune.noise import Measurement, observation_variances, variance_components
from mpromptune.repeats import without_repeats
from mpromptune.space import Row
from mpromptune.surrogate import Surrogate, fit

RowOf = Callable[[dict[str, object]], Row | None]


@dataclass(frozen=True)
class History:
    """What a study knows, for maximisation.

    Attributes:
        train_X: ``n x (C + 1)`` candidate indices and example-set index (-1: none recorded).
        train_Y: ``n x 1`` values; negated for a study that minimises.
        train_Yvar: ``n x 1`` observation variances, or None where no per-example scores exist.
        overlap: ``m x m`` shares of common examples of the m example sets (see `BlockKernel`).
        block_variance: Variance of the examples' difficulty.
        measured: Configuration to the examples that it was measured on.
        pending: Configurations of running trials.
        closed: Configurations with nothing left to measure.
        n_trials: Trials observed, those included that were pooled into one observation.
    """

    train_X: Tensor
    train_Y: Tensor
    train_Yvar: Tensor | None
    overlap: Tensor
    block_variance: float
    measured: dict[Row, set[int]]
    pending: tuple[Row, ...]
    closed: frozenset[Row]
    n_trials: int

    def __len__(self) -> int:
        return len(self.train_Y)

    @property
    def trial_noise(self) -> float | None:
        """Variance of a typical trial's value; None where trials have no per-example scores."""
        return None if self.train_Yvar is None else float(self.train_Yvar.median())


def proposed_params(trial: FrozenTrial) -> dict[str, object]:
    """The params of a trial, or those that a sampler handed to it and that it has yet to suggest."""
    return {**trial.system_attrs.get(PROPOSED, {}), **trial.params}


def read(study: Study, trials: Iterable[FrozenTrial], row_of: RowOf, num_components: int) -> History:
    """Turns trials into a History.

    Args:
        study: Their study, for its direction and the size of its validation set.
        trials: Any trials. COMPLETE ones are observations; PRUNED ones count as measured only;
            RUNNING ones are pending; FAIL and WAITING ones are ignored.
        row_of: Params to index row, or None for a trial of another search space.
        num_components: C.
    """
    placed = [(t, row) for t in trials if (row := row_of(proposed_params(t))) is not None]
    complete = [(t, row) for t, row in placed if t.state == TrialState.COMPLETE]
    finished = [(t, row) for t, row in placed if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    pending = tuple(row for t, row in placed if t.state == TrialState.RUNNING)
    n_examples = study.user_attrs.get(N_EXAMPLES, 0)
    measured = _measured(finished)
    closed = frozenset(row for row, examples in measured.items() if len(examples) >= n_examples)
    maximise = study.direction == StudyDirection.MAXIMIZE
    return _with_tensors(complete, maximise, num_components, n_examples, measured, pending, closed)


def _measured(finished: Sequence[tuple[FrozenTrial, Row]]) -> dict[Row, set[int]]:
    measured: dict[Row, set[int]] = {}
    for trial, row in finished:
        measured.setdefault(row, set()).update(trial.user_attrs.get(EXAMPLES, ()))
    return measured


def _with_tensors(
    complete: Sequence[tuple[FrozenTrial, Row]],
    maximise: bool,
    num_components: int,
    n_examples: int,
    measured: dict[Row, set[int]],
    pending: tuple[Row, ...],
    closed: frozenset[Row],
) -> History:
    observed = without_repeats(complete)
    sets = list(dict.fromkeys(s for t, _ in observed if (s := _examples(t))))
    index_of = {s: i for i, s in enumerate(sets)}
    rows = [[*row, index_of.get(_examples(t), -1)] for t, row in observed]
    values = _finite(np.array([t.value for t, _ in observed], dtype=np.float64))
    yvar, block_variance = _noise(observed)
    return History(
        train_X=torch.tensor(rows, dtype=torch.float64).reshape(len(rows), num_components + 1),
        train_Y=torch.from_numpy(values if maximise else -values).unsqueeze(-1),
        train_Yvar=yvar,
        overlap=_overlap(sets, n_examples),
        block_variance=block_variance,
        measured=measured,
        pending=pending,
        closed=closed,
        n_trials=len(complete),
    )


def _examples(trial: FrozenTrial) -> tuple[int, ...]:
    return tuple(trial.user_attrs.get(EXAMPLES, ()))


def _finite(values: FloatArray) -> FloatArray:
    """Clips infinite values to the finite ones' range, as Optuna's own GP sampler does."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    clipped: FloatArray = np.clip(values, low, high)
    return clipped


def _noise(observed: Sequence[tuple[FrozenTrial, Row]]) -> tuple[Tensor | None, float]:
    measurements: list[Measurement] = [
        (_examples(t), np.array(t.user_attrs[SCORES], dtype=np.float64))
        for t, _ in observed
        if t.user_attrs.get(SCORES)
    ]
    if not measurements or len(measurements) < len(observed):
        return None, 0.0
    components = variance_components(measurements)
    variances = observation_variances(measurements, [row for _, row in observed], components)
    return torch.from_numpy(variances).unsqueeze(-1), components.difficulty


def _overlap(sets: Sequence[tuple[int, ...]], n_examples: int) -> Tensor:
    r"""``m x m``: :math:`|B \cap B'| / (|B| |B'|) - 1 / N`.

    The last term is the finite-population correction: difficulties are deviations from the mean of
    the validation set, so a trial on all N examples has none, and what is uncertain about a
    configuration is not what all configurations share.
    """
    if not sets:
        return torch.zeros(0, 0, dtype=torch.float64)
    membership = np.zeros((len(sets), 1 + max(max(s) for s in sets)))
    for i, examples in enumerate(sets):
        membership[i, list(examples)] = 1.0 / len(examples)
    correction = 1.0 / n_examples if n_examples else 0.0
    return torch.from_numpy(membership @ membership.T - correction)


def fit_history(history: History, geometries: Sequence[Geometry]) -> Surrogate:
    """The surrogate of everything observed; needs at least one observation."""
    return fit(
        history.train_X,
        history.train_Y,
        history.train_Yvar,
        geometries,
        history.overlap,
        history.block_variance,
    )
