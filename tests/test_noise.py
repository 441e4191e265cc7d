"""Variance components, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mpromptune.noise import observation_variances, pooled_variance, variance_components


def simulated(m: int, n: int, blocks: int, difficulty: float, residual: float) -> list:
    rng = np.random.default_rng(0)
    measurements = []
    for block in range(blocks):
        examples = tuple(range(block * n, block * n + n))
        b = rng.normal(0.0, difficulty**0.5, n)
        scores = [rng.normal() + b + rng.normal(0.0, residual**0.5, n) for _ in range(m)]
        measurements += [(examples, s) for s in scores]
    return measurements


def test_components_are_recovered_from_many_blocks() -> None:
    """With enough data the prior is overruled and both variances are found."""
    components = variance_components(simulated(6, 10, 60, difficulty=0.9, residual=0.3))
    assert components.difficulty == pytest.approx(0.9, rel=0.15)
    assert components.residual == pytest.approx(0.3, rel=0.1)


def test_without_shared_blocks_the_split_is_even() -> None:
    """One trial per block says nothing about difficulty: half of the variance each."""
    scores = np.array([0.0, 1.0])
    components = variance_components([((0, 1), scores), ((2, 3), scores)])
    assert components.difficulty + components.residual == pytest.approx(pooled_variance([scores]), rel=0.2)
    assert components.difficulty_share == pytest.approx(0.5, abs=0.1)


def test_pooled_variance_by_hand() -> None:
    """(0.5 + 2.0) / (1 + 1)."""
    assert pooled_variance([np.array([0.0, 1.0]), np.array([1.0, 3.0])]) == pytest.approx(1.25)


def test_a_block_that_is_all_right_has_variance() -> None:
    """Shrinkage: certainty is not claimed from ten equal scores."""
    measurements = [((0, 1), np.array([1.0, 1.0])), ((2, 3), np.array([0.0, 1.0]))]
    variances = observation_variances(measurements, ["a", "b"], variance_components(measurements))
    assert 0.0 < variances[0] < variances[1]


def test_trials_of_one_configuration_share_their_variance() -> None:
    """The variance of a score belongs to the configuration, not to the block."""
    measurements = [((0, 1), np.array([1.0, 1.0])), ((2, 3), np.array([0.0, 1.0]))]
    variances = observation_variances(measurements, ["a", "a"], variance_components(measurements))
    assert variances[0] == variances[1]


def test_scores_that_never_vary_keep_the_matrix_regular() -> None:
    """All scores equal: the variances are small but positive."""
    measurements = [((0, 1), np.ones(2)), ((0, 1), np.ones(2))]
    variances = observation_variances(measurements, ["a", "b"], variance_components(measurements))
    assert (variances > 0.0).all()
