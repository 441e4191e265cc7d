"""Which configurations a batch is spent on."""

from __future__ import annotations

import numpy as np
import pytest

from mpromptune.model.allocation import largest_gain, propose
from mpromptune.model.beliefs import Beliefs
from mpromptune.model.embedding import Geometry, identity_views
from mpromptune.model.space import IndexSpace, Row

N = 40


def beliefs(skills: dict[Row, float], space: IndexSpace, seed: int = 0) -> Beliefs:
    """Configurations that were right on as many of the first examples as their skill says."""
    geometries = [Geometry(identity_views(n), g) for n, g in zip(space.sizes, space.groups, strict=True)]
    told = Beliefs(space, geometries)
    scores = np.full((len(skills), N), np.nan)
    for row, share in zip(scores, skills.values(), strict=True):
        row[:20] = np.random.default_rng(seed).permutation(20) < 20 * share
    told.tell(list(skills), scores)
    return told


def always(row: Row) -> bool:
    return True


@pytest.fixture
def five() -> Beliefs:
    return beliefs({(0,): 0.1, (1,): 0.85, (2,): 0.2, (3,): 0.8, (4,): 0.1}, IndexSpace([6]))


def test_calls_go_to_those_that_may_be_best(five: Beliefs):
    """Two good configurations and an unknown one share the batch; the three poor ones get next to nothing."""
    batch = propose(five, 40, 400, always, np.random.default_rng(0))
    assert len(batch) == 40
    assert sum(row in {(1,), (3,), (5,)} for row in batch) >= 36
    assert {(1,), (3,)} <= set(batch)


def test_the_same_generator_proposes_the_same_batch(five: Beliefs):
    """All randomness is the caller's."""
    one, other = (propose(five, 8, 100, always, np.random.default_rng(3)) for _ in range(2))
    assert one == other


def test_nothing_closed_is_proposed(five: Beliefs):
    """Only what may still be measured is."""
    assert set(propose(five, 8, 100, lambda row: row == (0,), np.random.default_rng(0))) <= {(0,)}
    assert propose(five, 8, 100, lambda row: False, np.random.default_rng(0)) == []


def test_only_listed_combinations_are_proposed():
    """Where not every combination exists, the others are never met."""
    space = IndexSpace([3, 3], [0, 0], [(0, 0), (1, 1), (2, 2)])
    told = beliefs({(0, 0): 0.5, (1, 1): 0.5}, space)
    assert set(propose(told, 30, 100, always, np.random.default_rng(0))) <= {(0, 0), (1, 1), (2, 2)}


def test_the_best_candidates_of_two_predictors_are_combined():
    """What was learnt of each predictor is put together: (1, 1) was never measured, (0, 0) is poor."""
    space = IndexSpace([2, 2])
    told = beliefs({(0, 0): 0.2, (1, 0): 0.7, (0, 1): 0.7}, space)
    all_four = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert int(told.skills(all_four)[0].argmax()) == 3
    assert (1, 1) in propose(told, 40, 400, always, np.random.default_rng(0))


def test_a_large_space_is_sampled_in_bounded_time():
    """Of a thousand candidates some hundred unmeasured ones are looked at, and the measured ones."""
    told = beliefs({(0,): 0.9, (1,): 0.1}, IndexSpace([1000]))
    assert len(propose(told, 16, 1000, always, np.random.default_rng(0))) == 16


def test_nothing_is_to_be_gained_where_nothing_is_open(five: Beliefs):
    """And something where a rival is."""
    assert largest_gain(five, (1,), lambda row: False, np.random.default_rng(0)) == 0.0
    assert largest_gain(five, (1,), lambda row: row != (1,), np.random.default_rng(0)) > 0.005
