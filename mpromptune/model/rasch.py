r"""Skills of configurations and difficulties of examples, from scores by example.

Notation
    y_xe     score of configuration x on example e, scaled
    theta_x  skill of x; the sum of a latent of each group: ``theta = Z u``
    d_e      difficulty of e, ``d ~ N(0, s^2)``
    u        latents, ``u ~ N(centre, K)`` (see `skills`)
    m, L, N  numbers of measured configurations, selected latents, and examples

Model
    .. math:: P(y_{xe} = 1) = \operatorname{logit}^{-1}(\theta_x - d_e)

    [Rasch1960]_ for scores that are right or wrong, or in [0, 1]; for others a normal distribution around
    :math:`\theta_x - d_e`. The posterior of (u, d) is approximated by Laplace's method [Rasmussen2006b]_;
    d is eliminated by its Schur complement, so that a step costs :math:`O(mN + L^3)`.

.. [Rasch1960] G. Rasch. Probabilistic Models for Some Intelligence and Attainment Tests. 1960.
.. [Rasmussen2006b] C. E. Rasmussen, C. Williams. Gaussian Processes for Machine Learning. MIT Press 2006,
    chapter 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from mpromptune.model.likelihood import Likelihood
from mpromptune.model.space import FloatArray, IndexArray

# NOTE: s, in logits: the recorded tables have examples that no configuration solves and examples that all
# configurations solve.
_DIFFICULTY = 2.0
# Newton's method: the largest step in logits, the step at convergence, and the most steps.
_STEP, _CONVERGED, _STEPS = 3.0, 1e-6, 50
# Steps of Newton's method in one dimension, where a narrow prior keeps them small.
_OWN_STEPS = 8


@dataclass(frozen=True)
class Posterior:
    """A normal approximation of skills and difficulties.

    Attributes:
        mean: Means of the L latents.
        root: Lower Cholesky factor of their precision, ``L x L``.
        difficulty: Difficulties of the N examples.
        precision: Precisions of the N difficulties, given the latents.
        likelihood: The likelihood of the scores.
        weights: ``K^-1`` times the mean minus the prior mean, length L; they give the means of other latents.
        data: The precision that the scores add to that of the prior, ``L x L``.
        log_evidence: Logarithm of the marginal likelihood.
    """

    mean: FloatArray
    root: FloatArray
    difficulty: FloatArray
    precision: FloatArray
    likelihood: Likelihood
    weights: FloatArray
    data: FloatArray
    log_evidence: float

    def extended(
        self, covariance: FloatArray, known: IndexArray, centre: FloatArray | float = 0.0
    ) -> Posterior:
        """The posterior of more latents, which include those of this one.

        Args:
            covariance: Prior covariance of all latents, ``L' x L'``.
            known: Positions of the L latents of this posterior among them.
            centre: Their prior means.
        """
        data = np.zeros_like(covariance)
        data[np.ix_(known, known)] = self.data
        weights = np.zeros(len(covariance))
        weights[known] = self.weights
        root = cholesky(_inverse(covariance)[0] + data, lower=True, check_finite=False)
        return replace(self, mean=centre + covariance @ weights, root=root, weights=weights, data=data)

    def deviations(self, rng: np.random.Generator, n: int) -> FloatArray:
        """Draws of the latents minus their mean, ``L x n``."""
        normal = rng.standard_normal((len(self.mean), n))
        drawn: FloatArray = solve_triangular(self.root, normal, lower=True, trans="T", check_finite=False)
        return drawn

    def variance(self, design: FloatArray) -> FloatArray:
        """Variances of the skills ``design @ latents``, ``k x L`` to k."""
        half = solve_triangular(self.root, design.T, lower=True, check_finite=False)
        variance: FloatArray = (half**2).sum(axis=0)
        return variance

    def own(self, design: FloatArray, scores: FloatArray, deviation: float) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of each configuration's deviation from its sum of latents, by its own scores.

        Args:
            design: ``m x L``.
            scores: ``m x N``, as fitted.
            deviation: Prior standard deviation.
        """
        seen = np.isfinite(scores)
        y = np.where(seen, self.likelihood.scaled(np.where(seen, scores, 0.0)), 0.0)
        base, own = (design @ self.mean)[:, None] - self.difficulty, np.zeros(len(scores))
        for _ in range(_OWN_STEPS):
            eta = base + own[:, None]
            precision = (seen * self.likelihood.information(eta)).sum(axis=1) + deviation**-2
            own = own + ((seen * self.likelihood.slope(eta, y)).sum(axis=1) - own / deviation**2) / precision
        return own, 1.0 / precision

    def information(self, skill: FloatArray | float) -> FloatArray:
        """Information of one score on each example about a skill, ``... x N``, averaged over difficulties."""
        spread = np.sqrt(1.0 + math.pi / 8.0 / self.precision)
        eta = (np.asarray(skill)[..., None] - self.difficulty) / spread
        return self.likelihood.information(eta)

    def sum_of(self, examples: Sequence[int], skill: float, variance: float) -> tuple[float, float]:
        """Mean and standard deviation of the sum of scores on examples, given a skill's mean and variance."""
        difficulty = self.difficulty[list(examples)]
        deviation = math.sqrt(variance)
        skills = skill + deviation * np.array([-1.0, 0.0, 1.0])
        low, middle, high = self.likelihood.mean(skills[:, None] - difficulty).sum(axis=1).tolist()
        noise = float(self.likelihood.variance(skill - difficulty).sum())
        return middle, math.sqrt(((high - low) / 2.0) ** 2 + noise)

    def score(self, skill: FloatArray) -> FloatArray:
        """Expected mean score over all examples, for skills of any shape."""
        means: FloatArray = self.likelihood.mean(skill[..., None] - self.difficulty).mean(axis=-1)
        return means


def fit(
    design: FloatArray,
    scores: FloatArray,
    covariance: FloatArray,
    likelihood: Likelihood,
    start: tuple[FloatArray, FloatArray] | None = None,
    centre: FloatArray | float = 0.0,
) -> Posterior:
    r"""Laplace's approximation at the mode, by Newton's method.

    With W the information of the scores and :math:`D = \operatorname{diag}(\sum_x W_{xe} + 1 / s^2)`, the
    precision of u is :math:`B = K^{-1} + Z^T (\operatorname{diag}(\sum_e W_{xe}) - W D^{-1} W^T) Z`.

    Args:
        design: Z, ``m x L``.
        scores: ``m x N``; NaN where a configuration was not measured.
        covariance: K, ``L x L``.
        likelihood: The likelihood of the scores.
        start: Initial values of the latents and of the difficulties.
        centre: Prior means of the latents.
    """
    seen = np.isfinite(scores)
    y = np.where(seen, likelihood.scaled(np.where(seen, scores, 0.0)), 0.0)
    inverse, prior_root = _inverse(covariance)
    u, d = (centre + np.zeros(len(covariance)), np.zeros(scores.shape[1])) if start is None else start
    for _ in range(_STEPS):
        eta = (design @ u)[:, None] - d
        weights, slopes = seen * likelihood.information(eta), seen * likelihood.slope(eta, y)
        precision = weights.sum(axis=0) + 1.0 / _DIFFICULTY**2
        down = -slopes.sum(axis=0) - d / _DIFFICULTY**2
        by_latent = design.T @ weights
        through = by_latent / precision
        data = design.T @ (weights.sum(axis=1)[:, None] * design) - through @ by_latent.T
        root = cholesky(inverse + data, lower=True, check_finite=False)
        up = design.T @ slopes.sum(axis=1) + through @ down - inverse @ (u - centre)
        du = cho_solve((root, True), up, check_finite=False)
        dd = (down + by_latent.T @ du) / precision
        largest = max(float(np.abs(du).max()), float(np.abs(dd).max()))
        scale = min(1.0, _STEP / largest) if largest else 1.0
        u, d = u + scale * du, d + scale * dd
        if largest < _CONVERGED:
            break
    eta, away = (design @ u)[:, None] - d, u - centre
    log_evidence = (
        float(likelihood.log_density(eta, y)[seen].sum())
        - 0.5 * float(away @ inverse @ away)
        - 0.5 * float(d @ d) / _DIFFICULTY**2
        - 0.5 * float(np.log(precision).sum())
        - len(d) * math.log(_DIFFICULTY)
        - float(np.log(np.diag(root)).sum())
        - float(np.log(np.diag(prior_root)).sum())
    )
    return Posterior(u, root, d, precision, likelihood, inverse @ away, data, log_evidence)


def _inverse(covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The inverse of a covariance, and its lower Cholesky factor."""
    root = cholesky(covariance, lower=True, check_finite=False)
    return cho_solve((root, True), np.eye(len(covariance)), check_finite=False), root
