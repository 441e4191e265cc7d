"""Skills and difficulties: the approximation against closed forms, and the likelihoods chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from mpromptune.model.likelihood import Likelihood, grades, likelihood_of
from mpromptune.model.rasch import fit

NAN = np.nan
# Two groups: latents 0 and 1 of the first, 2 of the second.
DESIGN = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 0.5]])
SCORES = np.array([[1.0, 0.0, NAN, 1.0], [0.0, NAN, 1.0, 1.0]])


def joint(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of (u, d) that the measured scores are sums of, and their covariance."""
    seen = np.argwhere(np.isfinite(scores))
    rows = np.array([[*DESIGN[x], *-np.eye(scores.shape[1])[e]] for x, e in seen])
    prior = np.zeros((7, 7))
    prior[:3, :3], prior[3:, 3:] = COVARIANCE, 4.0 * np.eye(4)
    return rows, prior


def test_grades_have_the_exact_posterior_of_a_normal_model():
    """With a normal likelihood, mean, covariance and evidence are those of conditioning a normal vector."""
    y = np.array([[0.5, -1.0, NAN, 2.0], [1.5, NAN, -0.5, 0.0]])
    posterior = fit(DESIGN, y, COVARIANCE, grades(0.0, 1.0))
    rows, prior = joint(y)
    values = y[np.isfinite(y)]
    total = rows @ prior @ rows.T + 4.0 * np.eye(len(values))
    gain = prior @ rows.T @ np.linalg.inv(total)
    assert_allclose(np.concatenate([posterior.mean, posterior.difficulty]), gain @ values, atol=1e-8)
    covariance = (prior - gain @ rows @ prior)[:3, :3]
    assert_allclose(np.linalg.inv(posterior.root @ posterior.root.T), covariance, atol=1e-8)
    exact = multivariate_normal(np.zeros(len(values)), total).logpdf(values)
    constant = 0.5 * (len(values) * np.log(2.0 * np.pi * 4.0) + values @ values / 4.0)
    assert posterior.log_evidence == pytest.approx(exact + constant)


def test_answers_are_fitted_at_the_mode_that_a_general_optimiser_finds():
    """Newton's method ends where the logarithm of the joint density is highest."""

    def minus_log(point: np.ndarray) -> float:
        eta = (DESIGN @ point[:3])[:, None] - point[3:]
        seen = np.isfinite(SCORES)
        likelihood = (np.nan_to_num(SCORES) * eta - np.logaddexp(0.0, eta))[seen].sum()
        return float(
            point[:3] @ np.linalg.solve(COVARIANCE, point[:3]) / 2 + point[3:] @ point[3:] / 8 - likelihood
        )

    posterior = fit(DESIGN, SCORES, COVARIANCE, Likelihood())
    found = minimize(minus_log, np.zeros(7), options={"gtol": 1e-9}).x
    assert_allclose(np.concatenate([posterior.mean, posterior.difficulty]), found, atol=1e-5)


@pytest.mark.parametrize("likelihood", [Likelihood(), Likelihood(dispersion=0.3), grades(0.0, 1.0)])
def test_slope_and_information_are_the_derivatives_of_the_density(likelihood: Likelihood):
    """By central differences."""
    eta, y, h = np.linspace(-3.0, 3.0, 13), np.full(13, 0.7), 1e-4
    ahead, behind = likelihood.log_density(eta + h, y), likelihood.log_density(eta - h, y)
    assert_allclose(likelihood.slope(eta, y), (ahead - behind) / (2 * h), atol=1e-6)
    curvature = (ahead - 2 * likelihood.log_density(eta, y) + behind) / h**2
    assert_allclose(likelihood.information(eta), -curvature, atol=1e-5)


def test_evidence_of_one_answer_is_close_to_its_integral():
    """P(right) of an unknown configuration on an unknown example is a half; Laplace's method is near it."""
    posterior = fit(np.ones((1, 1)), np.array([[1.0]]), np.ones((1, 1)), Likelihood())
    assert posterior.log_evidence == pytest.approx(np.log(0.5), abs=0.1)


def test_an_extended_posterior_is_that_of_a_fit_with_all_latents():
    """A latent that no configuration has is inferred from those that are alike."""
    covariance = np.array([[1.0, 0.6, 0.5], [0.6, 1.0, 0.2], [0.5, 0.2, 1.0]])
    design = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    whole = fit(design, SCORES, covariance, Likelihood())
    part = fit(design[:, :2], SCORES, covariance[:2, :2], Likelihood())
    extended = part.extended(covariance, np.array([0, 1]))
    assert_allclose(extended.mean, whole.mean, atol=1e-6)
    assert_allclose(extended.root, whole.root, atol=1e-6)


def test_a_configuration_that_is_far_worse_does_not_stretch_the_scale_of_the_rest():
    """The unit of grades is the noise within configurations and examples, whatever one of them scores."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0.0, 1.0, (6, 40)) + np.arange(6.0)[:, None] / 3
    worse = np.concatenate([scores, rng.normal(-1000.0, 1.0, (1, 40))])
    usual, stretched = likelihood_of(scores), likelihood_of(worse)
    assert usual.is_graded
    assert stretched.is_graded
    assert stretched.scale == pytest.approx(usual.scale, rel=0.2)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 1.0, 1.0], Likelihood()),
        ([1.0, 1.0, 1.0], Likelihood()),
        ([0.0, 0.0, 0.0], Likelihood()),
        ([-1.0, 1.0, 1.0], Likelihood(-1.0, 2.0)),
        ([0.0, 100.0, NAN], Likelihood(0.0, 100.0)),
        ([7.0, 7.0, 7.0], grades(7.0, 0.5)),
    ],
)
def test_the_scores_choose_their_likelihood(scores: list[float], expected: Likelihood):
    """Two values are right and wrong; numbers in [0, 1] too; all others are grades."""
    assert likelihood_of(np.array([scores])) == expected


def test_scores_between_right_and_wrong_say_more_than_answers_do():
    """A graded metric varies less than right and wrong would, so each score has more information."""
    rng = np.random.default_rng(1)
    graded = np.clip(0.6 + 0.05 * rng.standard_normal((8, 50)), 0.0, 1.0)
    likelihood = likelihood_of(graded)
    assert not likelihood.is_graded
    assert likelihood.dispersion < 0.2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_configurations_and_examples_does_not_matter(seed: int):
    """Rows and columns may be permuted: the posterior is permuted with them."""
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random((5, 8)) < 0.6, (rng.random((5, 8)) < 0.5).astype(float), NAN)
    covariance = 0.5 * np.eye(5) + 0.5
    rows, columns = rng.permutation(5), rng.permutation(8)
    one = fit(np.eye(5), scores, covariance, Likelihood())
    other = fit(np.eye(5), scores[rows][:, columns], covariance, Likelihood())
    assert_allclose(other.mean, one.mean[rows], atol=1e-6)
    assert_allclose(other.difficulty, one.difficulty[columns], atol=1e-6)
    assert other.log_evidence == pytest.approx(one.log_evidence, abs=1e-6)


def test_the_mean_score_lies_between_the_lowest_and_the_highest():
    """Expected scores are in the metric's own units."""
    posterior = fit(
        np.eye(2), np.array([[0.0, 100.0], [100.0, 100.0]]), np.eye(2) + 1, Likelihood(0.0, 100.0)
    )
    low, high = posterior.score(posterior.mean)
    assert 0.0 < low < high < 100.0
