"""The expected best of a random choice, against lists of all choices."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpromptune.model.chance import expected_best


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=7))
@settings(max_examples=50, deadline=None)
def test_of_certain_values_it_is_the_mean_over_all_choices(values: list[float]) -> None:
    """Every set of k is equally likely, and nothing is drawn twice; ties and negatives do not matter."""
    found = expected_best(np.array(values), np.zeros(len(values)), len(values))
    for k, best in enumerate(found, start=1):
        by_hand = np.mean([max(chosen) for chosen in combinations(values, k)])
        assert best == pytest.approx(by_hand, rel=1e-9, abs=1e-9)


def test_of_uncertain_values_it_is_that_of_normal_variables() -> None:
    """Of three alike, in units of the deviation: 0, 1 / sqrt(pi) and 3 / (2 sqrt(pi)) above the mean."""
    found = expected_best(np.full(3, 0.6), np.full(3, 0.1), 3)
    expected = 0.6 + 0.1 * np.array([0.0, 1.0, 1.5]) / np.pi**0.5
    assert found == pytest.approx(expected, abs=1e-4)


def test_certain_and_uncertain_values_mix() -> None:
    """max(0, Z) has the mean 1 / sqrt(2 pi); one of the two alone is 0 on average."""
    found = expected_best(np.zeros(2), np.array([0.0, 1.0]), 2)
    assert found == pytest.approx([0.0, 1 / (2 * np.pi) ** 0.5], abs=2e-2)


def test_simulation_agrees() -> None:
    """Means and deviations that differ: against 200 000 draws."""
    rng = np.random.default_rng(0)
    means, stds = rng.normal(size=6), rng.uniform(0.2, 1.0, size=6)
    drawn = rng.normal(means, stds, size=(200_000, 6))
    shuffled = rng.permuted(drawn, axis=1)
    simulated = [shuffled[:, :k].max(axis=1).mean() for k in range(1, 7)]
    assert expected_best(means, stds, 6) == pytest.approx(simulated, abs=0.01)


def test_more_draws_are_never_worse() -> None:
    """The whole space holds its maximum."""
    values = np.random.default_rng(1).normal(size=300)
    best = expected_best(values, np.zeros(300), 300)
    assert (np.diff(best) >= -1e-12).all()
    assert (best[0], best[-1]) == pytest.approx((values.mean(), values.max()))
