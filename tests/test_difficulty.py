"""How hard examples are, and what scores say of configurations then."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpromptune.model.difficulty import Difficulty, as_matrix, difficulty_of, summarise, telling_first

NO = np.nan


def random_scores(seed: int, m: int = 5, n: int = 8) -> np.ndarray:
    """Right and wrong answers to about half of the examples, at least one in every row."""
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random((m, n)) < 0.5, (rng.random((m, n)) < 0.6).astype(float), NO)
    scores[:, 0] = np.where(np.isnan(scores[:, 0]), 1.0, scores[:, 0])
    return scores


def test_scores_by_example_become_a_matrix() -> None:
    """Not a number where there is no score."""
    matrix = as_matrix([{2: 0.5}, {0: 1.0, 1: 0.0}], 3)
    assert np.array_equal(matrix, [[NO, NO, 0.5], [1.0, 0.0, NO]], equal_nan=True)


def test_what_configurations_differ_on_comes_early() -> None:
    """Of two hundred examples, a tenth divides the configurations: most of those are in the first tenth."""
    telling = np.arange(0, 200, 10)
    scores = np.ones((8, 200))
    scores[::2, telling] = 0.0
    order = telling_first(scores, np.random.default_rng(0).permutation(200).tolist())
    assert sorted(order) == list(range(200))
    assert 10 < len(set(order[:20]) & set(telling.tolist())) < 20


def test_an_example_comes_before_another_as_often_as_it_tells_more() -> None:
    """Of two, with weights w and v, the first comes first with probability w / (w + v)."""
    scores = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    rows = np.hstack([np.tile(scores[:, :1], 100), np.tile(scores[:, 1:], 100)])
    rng = np.random.default_rng(0)
    orders = [np.argsort(telling_first(rows, rng.permutation(200).tolist())) for _ in range(50)]
    before = np.mean([np.mean(place[:100, None] < place[None, 100:]) for place in orders])
    w, v = difficulty_of(rows).information[[0, 100]]
    assert before == pytest.approx(w / (w + v), abs=0.02)


def test_of_equal_examples_the_first_comes_first() -> None:
    """Where nothing is known that tells them apart, the order is that given."""
    assert telling_first(np.array([[1.0, NO, NO, NO]]), [3, 1, 2])[:3] == [3, 1, 2]


@given(st.integers(0, 10**6), st.floats(0.1, 100.0), st.floats(-50.0, 50.0))
def test_units_do_not_matter(seed: int, unit: float, origin: float) -> None:
    """Scores in other units, or from another zero: the same difficulty in those, the same estimates."""
    scores = random_scores(seed)
    plain, other = difficulty_of(scores), difficulty_of(origin + unit * scores)
    if np.nanmin(scores) == np.nanmax(scores):
        return
    assert other.mean == pytest.approx(origin + unit * plain.mean)
    assert other.spread == pytest.approx(unit**2 * plain.spread)
    values = summarise(origin + unit * scores, other).values
    assert values == pytest.approx(origin + unit * summarise(scores, plain).values, abs=1e-6 * unit + 1e-6)


def test_the_beta_distribution_is_recovered() -> None:
    """Four answers each to 3000 examples of Beta(0.8, 0.2): of concentration 1."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.8, 0.2, 3000)
    known = difficulty_of((rng.random((4, 3000)) < p).astype(float))
    assert known.mean == pytest.approx(0.8, abs=0.03)
    assert known.variance == pytest.approx(known.spread, rel=0.15)


def test_after_some_answers_difficulty_is_known_as_well_as_a_beta_distribution_is() -> None:
    """Variance a b / ((a + b)^2 (a + b + 1)) after k answers, w of them right: the prior is conjugate."""
    rng = np.random.default_rng(0)
    scores = (rng.random((4, 300)) < rng.beta(0.8, 0.2, 300)).astype(float)
    known, k, w = difficulty_of(scores), 4, scores.sum(axis=0)
    s = (known.spread / known.variance)[0]
    a, b = s * known.mean + w, s * (1.0 - known.mean) + k - w
    expected = a * b / ((a + b) ** 2 * (a + b + 1.0))
    assert 1.0 / (1.0 / known.variance + k / known.spread) == pytest.approx(expected, rel=1e-6)


def test_difficulties_of_a_graded_metric_vary_however_little_its_answers_do() -> None:
    """Examples' means around one half with a deviation of a fifth, answers with a hundredth around these."""
    rng = np.random.default_rng(0)
    means = np.clip(0.5 + 0.2 * rng.standard_normal(300), 0.0, 1.0)
    known = difficulty_of(np.clip(means + 0.01 * rng.standard_normal((20, 300)), 0.0, 1.0))
    assert np.sqrt(known.variance.mean()) == pytest.approx(0.2, rel=0.2)
    assert np.sqrt(known.spread.mean()) < 0.1


def test_scores_of_a_graded_metric_vary_less_than_right_and_wrong() -> None:
    """Scores around one half that differ by hundredths, and two that set the scale."""
    rng = np.random.default_rng(0)
    scores = 0.5 + 0.01 * rng.standard_normal((10, 100))
    scores[0, 0], scores[0, 1] = 0.0, 1.0
    assert difficulty_of(scores).spread.mean() < 0.02


def brute_force(scores: np.ndarray, difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """Generalised least squares on every single score, with the covariance of all of them written out."""
    m, n = scores.shape
    at = [(c, e) for c in range(m) for e in range(n) if not np.isnan(scores[c, e])]
    y = np.array([scores[c, e] for c, e in at]) - difficulty.mean
    design = np.array([[difficulty.slope[e] * (c == row) for row in range(m)] for c, e in at])
    by_itself = difficulty.variance
    of_difficulty = np.diag(by_itself) - np.outer(by_itself, by_itself) / by_itself.sum()  # add up to zero
    covariance = np.array(
        [[of_difficulty[e, g] + difficulty.spread[e] * ((c, e) == (d, g)) for d, g in at] for c, e in at]
    )
    precision = design.T @ np.linalg.solve(covariance, design)
    evidence = design.T @ np.linalg.solve(covariance, y)
    return difficulty.mean + np.linalg.solve(precision, evidence), np.linalg.inv(precision)


@given(st.integers(0, 10**6))
def test_the_summary_is_generalised_least_squares(seed: int) -> None:
    """Integrating the difficulties out one configuration at a time is exact."""
    scores = random_scores(seed)
    variance, spread = np.random.default_rng(seed).uniform(0.02, 0.25, (2, scores.shape[1]))
    difficulty = Difficulty(0.6, variance, spread)
    summary = summarise(scores, difficulty)
    values, covariance = brute_force(scores, difficulty)
    assert summary.values == pytest.approx(values, rel=1e-6, abs=1e-8)
    assert summary.root @ summary.root.T + np.diag(summary.own) == pytest.approx(
        covariance, rel=1e-6, abs=1e-8
    )


def test_measured_on_everything_is_the_plain_mean() -> None:
    """Difficulty cancels: what is estimated is the mean of the scores, whatever their weights."""
    scores = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    summary = summarise(scores, Difficulty(0.5, np.full(4, 10.0), np.array([0.2, 0.1, 0.05, 0.2])))
    assert summary.values[0] - summary.values[1] == pytest.approx(0.5, abs=0.02)


def test_scores_that_never_vary_can_be_summarised() -> None:
    """All the same: that is everybody's mean, and no variance is zero."""
    scores = np.array([[1.0, 1.0, NO], [NO, 1.0, 1.0]])
    summary = summarise(scores, difficulty_of(scores))
    assert summary.values == pytest.approx([1.0, 1.0])
    assert (summary.own > 0.0).all()
