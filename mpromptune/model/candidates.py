"""Which configurations a proposal may choose from: all, or a sample refined by local search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mpromptune.model.space import IndexArray, IndexSpace, Row

LISTED = 2000  # configurations that a proposal lists, by default

Value = Callable[[Tensor], Tensor]  # n x C rows -> n values, the higher the better

# NOTE: starts, steps, and rows kept of a step. A bound on the work rather than a tuned choice: the
# leader and two rivals, and more steps than a program of a few predictors has components.
_STARTS = 3
_STEPS = 8
_KEPT = 64
# NOTE: neighbours up to which a step looks at all of them. Beyond (a step would cost as much as a proposal),
# each component in turn takes a step of its own, twice; and as many rows of it are kept as make up those of
# the steps above, for a program of 8 predictors.
_ALL_AT_ONCE = 512
_SWEEPS = 2
_KEPT_OF_SWEEP = 16


def choice_set(
    space: IndexSpace,
    max_space_size: int,
    allowed: Callable[[Row], bool],
    rng: np.random.Generator,
    value: Value | None = None,
    starts: Sequence[Row] = (),
) -> Tensor:
    """The choices for one proposal, ``N x C``; empty when no configuration is allowed.

    Args:
        space: The configurations that exist.
        max_space_size: Up to this size all of them are choices. Above it, ``max_space_size`` of
            them drawn at random and, with ``value``, what a coordinate-wise local search meets,
            and the starts themselves: what was measured may be measured again.
        allowed: Whether a configuration may be proposed.
        rng: Draws the sample.
        value: Acquisition value of single configurations, for the local search.
        starts: Configurations to start from, the best first.
    """
    rows = space.sample(max_space_size, rng)
    if value is not None and space.size > max_space_size:
        found = [local_search(space, start, value) for start in starts[:_STARTS]]
        rows = np.unique(np.concatenate([rows, *found, np.array(starts, dtype=rows.dtype)]), axis=0)
    keep = [allowed(tuple(row)) for row in rows.tolist()]
    return torch.from_numpy(rows[np.array(keep, dtype=bool)])


def local_search(space: IndexSpace, start: Row, value: Value) -> IndexArray:
    """Climbs from ``start`` by single changes; returns the best rows met on the way.

    Each is the best of all; or, where these are many, the best of one component after the other.
    """
    if space.combinations is None and sum(space.sizes) > _ALL_AT_ONCE:
        return _by_component(space, start, value)
    current, best, met = start, -np.inf, []
    for _ in range(_STEPS):
        rows = space.neighbours(current)
        if not len(rows):
            break
        values = value(torch.from_numpy(rows)).numpy()
        order = np.argsort(-values, kind="stable")
        met.append(rows[order[:_KEPT]])
        if values[order[0]] <= best:
            break
        current, best = tuple(rows[order[0]].tolist()), float(values[order[0]])
    return np.concatenate(met) if met else np.empty((0, len(start)), dtype=np.int64)


def _by_component(space: IndexSpace, start: Row, value: Value) -> IndexArray:
    current, best = start, float(value(torch.tensor([start])))
    met = []
    for _ in range(_SWEEPS):
        before = best
        for component in range(len(space.sizes)):
            rows = space.moves_along(current, component)
            values = value(torch.from_numpy(rows)).numpy()
            order = np.argsort(-values, kind="stable")
            met.append(rows[order[:_KEPT_OF_SWEEP]])
            if len(rows) and values[order[0]] > best:
                current, best = tuple(rows[order[0]].tolist()), float(values[order[0]])
        if best == before:
            break
    return np.concatenate(met)
