"""An Optuna study's trials as tensors: what was measured, and what is running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import FloatArray
from mpromptune.model.geometry import Geometry
from mpromptune.model.noise import LARGEST
from mpromptune.model.space import Row
from mpromptune.model.surrogate import Surrogate, fit
from mpromptune.storage.attributes import PROPOSED

RowOf = Callable[[dict[str, object]], Row | None]

_MEASURED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class History:
    """What a study knows, for maximisation.

    Attributes:
        train_X: ``n x C`` candidate indices.
        train_Y: ``n x 1`` values; negated for a study that minimises.
        measured: Configurations that have been measured.
        pending: Configurations of running trials.
    """

    train_X: Tensor
    train_Y: Tensor
    measured: frozenset[Row]
    pending: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.train_Y)


def proposed_params(trial: FrozenTrial) -> dict[str, object]:
    """The params of a trial, or those that a sampler handed to it and that it has yet to suggest."""
    return {**trial.system_attrs.get(PROPOSED, {}), **trial.params}


@plain_torch()
def read(study: Study, trials: Iterable[FrozenTrial], row_of: RowOf, num_components: int) -> History:
    """Turns trials into a History.

    Args:
        study: Their study, for its direction.
        trials: Any trials. COMPLETE ones are observations; PRUNED ones count as measured only; RUNNING ones
            are pending; FAIL and WAITING ones are ignored.
        row_of: Params to index row, or None for a trial of another search space.
        num_components: C.
    """
    placed = [(t, row) for t in trials if (row := row_of(proposed_params(t))) is not None]
    complete = [(t, row) for t, row in placed if t.state == TrialState.COMPLETE]
    values = _finite(np.array([t.value for t, _ in complete], dtype=np.float64))
    rows = [row for _, row in complete]
    return History(
        train_X=torch.tensor(rows, dtype=torch.float64).reshape(len(rows), num_components),
        train_Y=torch.from_numpy(values if study.direction == StudyDirection.MAXIMIZE else -values)[:, None],
        measured=frozenset(row for t, row in placed if t.state in _MEASURED),
        pending=tuple(row for t, row in placed if t.state == TrialState.RUNNING),
    )


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


def fit_history(history: History, geometries: Sequence[Geometry]) -> Surrogate:
    """The surrogate of everything observed; needs at least one observation."""
    return fit(history.train_X, history.train_Y, None, geometries)


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
    return all(torch.equal(a, b) for a, b in pairs)


def _observations(history: History) -> tuple[Tensor, Tensor]:
    return history.train_X, history.train_Y
