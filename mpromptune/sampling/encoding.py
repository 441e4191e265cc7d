"""Encodes Optuna studies for the surrogate: params <-> index rows, and trials -> tensors.

Every parameter becomes a component with an enumerated list of values: texts are embedded, numbers are on a
grid, and other choices are compared by identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import Embedder, Geometry, geometry_of, identity_views, point_views
from mpromptune.model.space import FloatArray, IndexSpace, PromptSpace, Row, groups_of
from mpromptune.model.statistics import LARGEST
from mpromptune.storage.attributes import PROPOSED

# NOTE: levels in the grid of a numeric parameter; tens of trials cannot distinguish finer ones. Observed
# values are added to the grid, so that the model never rounds them.
_GRID = 64
_ALL_LEVELS = 1000


@dataclass(frozen=True)
class History:
    """The observations of a study, for maximisation.

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


@dataclass(frozen=True)
class Encoding:
    """A search space in which every parameter has an enumerated list of values.

    Attributes:
        names: Parameter names, one per component.
        values: For each component, the parameter value of each index.
        space: The index rows that exist.
        geometries: Distances between the values of each component.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    space: IndexSpace
    geometries: tuple[Geometry, ...]

    @plain_torch()
    def on(self, device: torch.device) -> Encoding:
        """A copy whose distances, and so the surrogate, are on a device."""
        return replace(self, geometries=tuple(replace(g, views=g.views.to(device)) for g in self.geometries))

    @cached_property
    def _index_of(self) -> tuple[dict[Any, int], ...]:
        return tuple({_key(v): i for i, v in enumerate(values)} for values in self.values)

    def row(self, params: Mapping[str, Any]) -> Row | None:
        """Params to an index row; None when a parameter is missing or has an unknown value."""
        row: list[int] = []
        for name, index_of in zip(self.names, self._index_of, strict=True):
            if len(index_of) == 1:
                row.append(0)  # Optuna does not pass parameters with a single value to samplers
            elif name in params and (index := index_of.get(_key(params[name]))) is not None:
                row.append(index)
            else:
                return None
        return tuple(row)

    def params(self, row: Sequence[int]) -> dict[str, Any]:
        """An index row to params."""
        return {name: values[i] for name, values, i in zip(self.names, self.values, row, strict=True)}

    @plain_torch()
    def history(self, study: Study, trials: Iterable[FrozenTrial]) -> History:
        """The observations of a study for configurations of this space.

        COMPLETE trials are observations; PRUNED ones only count as measured; RUNNING ones are pending; FAIL
        and WAITING ones, and trials of another space, are ignored.
        """
        placed = [(t, row) for t in trials if (row := self.row(proposed_params(t))) is not None]
        complete = [(t, row) for t, row in placed if t.state == TrialState.COMPLETE]
        values = _finite(np.array([t.value for t, _ in complete], dtype=np.float64))
        rows = np.array([row for _, row in complete], dtype=np.float64).reshape(-1, len(self.names))
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        return History(
            train_X=torch.from_numpy(rows),
            train_Y=torch.from_numpy(sign * values)[:, None],
            measured=frozenset(r for t, r in placed if t.state in (TrialState.COMPLETE, TrialState.PRUNED)),
            pending=tuple(row for t, row in placed if t.state == TrialState.RUNNING),
        )

    def distances(self) -> dict[str, FloatArray] | None:
        """Component to squared distances between its candidates; None if all are compared by identity."""
        if not any(len(geometry.views) for geometry in self.geometries):
            return None
        return {n: g.mean_distances() for n, g in zip(self.names, self.geometries, strict=True)}


def proposed_params(trial: FrozenTrial) -> dict[str, Any]:
    """The params of a trial, including those that were proposed for it but not suggested yet."""
    return {**trial.system_attrs.get(PROPOSED, {}), **trial.params}


def _key(value: Any) -> Any:
    # True, 1 and 1.0 are equal as dictionary keys, but not as choices; NaN and lists cannot be keys.
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return value
    return type(value).__name__, repr(value)


def _finite(values: FloatArray) -> FloatArray:
    """Clip infinite values to the range of the finite ones, as Optuna's GP sampler does.

    If a value is too large for a measurement, it stands for a failure, and all values are replaced by ranks.
    """
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    clipped: FloatArray = np.clip(values, low, high)
    if max(high, -low) > LARGEST:
        return np.unique(clipped, return_inverse=True)[1].astype(np.float64)
    return clipped


def distributions_of(
    space: PromptSpace, capacity: Mapping[str, int] | None = None
) -> dict[str, BaseDistribution]:
    """Every component as a categorical parameter over its candidates' indices, as in MIPROv2.

    Optuna's distributions cannot grow, so a space that does has a fixed ``capacity`` for each component;
    indices without a candidate are not proposed.
    """
    sizes = capacity or dict(zip(space.names, space.sizes, strict=True))
    return {name: CategoricalDistribution(range(size)) for name, size in sizes.items()}


def encode_prompts(space: PromptSpace, embedder: Embedder | None) -> Encoding:
    """The encoding of a PromptSpace, whose parameters are candidate indices."""
    values = tuple(tuple(range(size)) for size in space.sizes)
    return Encoding(space.names, values, space, geometry_of(space, embedder))


def encode_distributions(
    search_space: Mapping[str, BaseDistribution],
    observed: Sequence[Mapping[str, Any]],
    embedder: Embedder | None,
    known: Encoding | None = None,
) -> Encoding:
    """The encoding of any Optuna search space.

    Args:
        search_space: Parameter names and distributions.
        observed: Params of the trials so far; their numeric values become grid points.
        embedder: Embeds choices that are all strings; None compares choices by identity.
        known: Encoding of a PromptSpace, with the geometries of parameters that are its components.
    """
    names = tuple(search_space)
    groups = groups_of(names)
    of_name = {} if known is None else dict(zip(known.names, known.geometries, strict=True))
    values, geometries = [], []
    for group, (name, distribution) in zip(groups, search_space.items(), strict=True):
        points = _values(distribution, [p[name] for p in observed if name in p])
        same = of_name.get(name)
        if same is not None and points == tuple(range(same.views.shape[-1])):
            views = same.views
        else:
            views = _views(distribution, points, embedder)
        values.append(points)
        geometries.append(Geometry(views, group))
    return Encoding(names, tuple(values), IndexSpace([*map(len, values)], groups), tuple(geometries))


def _values(distribution: BaseDistribution, observed: Sequence[Any]) -> tuple[Any, ...]:
    """All choices; for numbers, all values on the step grid if they are few, or a grid and the observed."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    levels = _GRID
    if distribution.step is not None and not distribution.log:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        levels = count if count <= _ALL_LEVELS else _GRID
    grid = {_level(distribution, u) for u in np.linspace(0.0, 1.0, levels)}
    # The range may have changed since the values were observed.
    return tuple(sorted(grid | {v for v in observed if distribution.low <= v <= distribution.high}))


def _views(distribution: BaseDistribution, points: tuple[Any, ...], embedder: Embedder | None) -> Tensor:
    if isinstance(distribution, FloatDistribution | IntDistribution):
        low, high = _bounds(distribution)
        raw = np.log(np.array(points, float)) if distribution.log else np.array(points, float)
        return point_views((raw[:, None] - low) / ((high - low) or 1.0))
    if embedder is not None and all(isinstance(choice, str) for choice in points):
        return point_views(embedder(list(points)))
    return identity_views(len(points))


def _bounds(distribution: FloatDistribution | IntDistribution) -> tuple[float, float]:
    bounds = np.array([distribution.low, distribution.high], dtype=np.float64)
    low, high = np.log(bounds) if distribution.log else bounds
    return float(low), float(high)


def _level(distribution: FloatDistribution | IntDistribution, u: float) -> float | int:
    """The value at the fraction ``u`` of the range (logarithmic or not), rounded to the step grid."""
    low, high = _bounds(distribution)
    raw = low + u * (high - low)
    value = float(np.exp(raw)) if distribution.log else raw
    if distribution.step is not None and not distribution.log:
        value = distribution.low + distribution.step * round((value - distribution.low) / distribution.step)
    value = min(max(value, distribution.low), distribution.high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)
