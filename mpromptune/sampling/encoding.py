"""Optuna parameters as index components: texts are embedded, everything else is featurised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from torch import Tensor

from mpromptune.model.embedding import CachedEmbedder, FloatArray
from mpromptune.model.geometry import (
    Geometry,
    geometry_of,
    identity_views,
    mean_distances,
    numeric_views,
    text_views,
)
from mpromptune.model.space import IndexSpace, PromptSpace, Row, groups_of
from mpromptune.sampling.history import LastFit

# NOTE: grid of a numeric parameter. The observed values are added to it, so the model never rounds
# what it has seen; 64 levels are finer than what tens of trials can tell apart.
_GRID = 64
_ALL_LEVELS = 1000

Numeric = FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Encoding:
    """A search space in which every parameter has an enumerated list of values.

    Attributes:
        names: Parameter names, one per component.
        values: For each component, the parameter values that its indices stand for.
        space: The index rows that exist.
        geometries: Distances between the values of each component.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    space: IndexSpace
    geometries: tuple[Geometry, ...]

    def on(self, device: torch.device) -> Encoding:
        """The same with its distances, and so the surrogate, on a device."""
        return replace(self, geometries=tuple(geometry.on(device) for geometry in self.geometries))

    @cached_property
    def surrogates(self) -> LastFit:
        """What is fitted to trials of this space."""
        return LastFit(self.geometries)

    @cached_property
    def _index_of(self) -> tuple[dict[Any, int], ...]:
        return tuple({_key(v): i for i, v in enumerate(values)} for values in self.values)

    def row(self, params: Mapping[str, Any]) -> Row | None:
        """Params to an index row; None when a parameter is missing or has an unknown value."""
        found = [self._index(c, params) for c in range(len(self.names))]
        indices = [i for i in found if i is not None]
        return tuple(indices) if len(indices) == len(found) else None

    def _index(self, component: int, params: Mapping[str, Any]) -> int | None:
        index_of = self._index_of[component]
        if len(index_of) == 1:
            return 0  # Optuna does not pass on parameters that have a single value
        name = self.names[component]
        return index_of.get(_key(params[name])) if name in params else None

    def params(self, row: Sequence[int]) -> dict[str, Any]:
        """An index row to params."""
        return {name: values[i] for name, values, i in zip(self.names, self.values, row, strict=True)}


def _key(value: Any) -> Any:
    # True == 1 == 1.0 as dictionary keys, but not as choices; NaN is no key, lists are not hashable.
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return value
    return type(value).__name__, repr(value)


def encode_prompts(space: PromptSpace, embedder: CachedEmbedder | None) -> Encoding:
    """The encoding of a PromptSpace, whose parameters are candidate indices."""
    values = tuple(tuple(range(size)) for size in space.sizes)
    return Encoding(space.names, values, space, geometry_of(space, embedder))


def candidate_distances(encoding: Encoding) -> dict[str, FloatArray] | None:
    """Component to the squared distances between its candidates; None where all go by identity alone."""
    if not any(len(geometry.views) for geometry in encoding.geometries):
        return None
    pairs = zip(encoding.names, encoding.geometries, strict=True)
    return {name: mean_distances(geometry) for name, geometry in pairs}


def encode_distributions(
    search_space: Mapping[str, BaseDistribution],
    observed: Sequence[Mapping[str, Any]],
    embedder: CachedEmbedder | None,
    known: Encoding | None = None,
) -> Encoding:
    """The encoding of any Optuna search space.

    Args:
        search_space: Parameter names and distributions.
        observed: Params of the trials so far; their numeric values become grid points.
        embedder: For categorical parameters whose choices are all strings; None compares choices
            by identity.
        known: Geometries for those parameters that are components of a PromptSpace.
    """
    names = tuple(search_space)
    groups = groups_of(names)
    values, geometries = [], []
    for group, (name, distribution) in zip(groups, search_space.items(), strict=True):
        seen = [p[name] for p in observed if name in p]
        points = _values(distribution, [value for value in seen if _is_within(distribution, value)])
        views = _known_views(known, name, points)
        if views is None:
            views = _views(distribution, points, embedder)
        values.append(points)
        geometries.append(Geometry(views, group))
    space = IndexSpace([len(points) for points in values], groups)
    return Encoding(names, tuple(values), space, tuple(geometries))


def _known_views(known: Encoding | None, name: str, points: tuple[Any, ...]) -> Tensor | None:
    if known is None or name not in known.names:
        return None
    component = known.names.index(name)
    return known.geometries[component].views if known.values[component] == points else None


def _values(distribution: BaseDistribution, observed: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    grid = {_level(distribution, u) for u in np.linspace(0.0, 1.0, _levels(distribution))}
    return tuple(sorted(grid | set(observed)))


def _levels(distribution: Numeric) -> int:
    """All values of a stepped parameter where they are few; a grid otherwise."""
    if distribution.step is None or distribution.log:
        return _GRID
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return count if count <= _ALL_LEVELS else _GRID


def _is_within(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value seen earlier is still in the range, which may have changed since."""
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return bool(distribution.low <= value <= distribution.high)
    return True


def _views(
    distribution: BaseDistribution, points: tuple[Any, ...], embedder: CachedEmbedder | None
) -> Tensor:
    if not isinstance(distribution, CategoricalDistribution):
        return numeric_views([_position(distribution, value) for value in points])
    if embedder is not None and all(isinstance(choice, str) for choice in points):
        return text_views(points, embedder)
    return identity_views(len(points))


def _bounds(distribution: Numeric) -> tuple[float, float]:
    bounds = np.array([distribution.low, distribution.high], dtype=np.float64)
    low, high = np.log(bounds) if distribution.log else bounds
    return float(low), float(high)


def _level(distribution: Numeric, u: float) -> float | int:
    """The value at the fraction ``u`` of the (possibly logarithmic) range, on the step grid."""
    low, high = _bounds(distribution)
    raw = low + u * (high - low)
    value = float(np.exp(raw)) if distribution.log else raw
    if distribution.step is not None and not distribution.log:
        value = distribution.low + distribution.step * round((value - distribution.low) / distribution.step)
    value = min(max(value, distribution.low), distribution.high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


def _position(distribution: BaseDistribution, value: float) -> float:
    """The fraction of the range at which ``value`` lies; the inverse of `_level`."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = _bounds(distribution)
    raw = float(np.log(value)) if distribution.log else float(value)
    return (raw - low) / (high - low) if high > low else 0.0
