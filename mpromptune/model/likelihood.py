"""The likelihood of scores given skill minus difficulty: right and wrong answers, or grades of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from mpromptune.model.space import FloatArray

# NOTE: grades are scaled so that their noise has this standard deviation. A grade then has as much
# information about a logit as a right-or-wrong answer has at most, so one prior fits both.
_NOISE = 2.0
# NOTE: grades are clipped at this many standard deviations of the noise: a configuration that is far worse
# than all others is still recognised, and does not change the scale of the others.
_FARTHEST = 5.0
# NOTE: smallest range of scores in [0, 1] that count as answers; with a smaller range they are grades.
_LEAST_RANGE = 0.1
# Scores are clipped at this many typical distances from the median, so that doubles keep enough digits.
_NEAR = 1e6
# NOTE: smallest dispersion: the variance of scores between right and wrong, as a fraction of that of answers.
_LEAST_DISPERSION = 0.05


@dataclass(frozen=True)
class Likelihood:
    r"""A generalised linear model of scaled scores y with the natural link [McCullagh1989]_.

    .. math:: \log p(y | \eta) = (y \eta - b(\eta)) / \varphi + c(y), \quad
        E[y] = b'(\eta), \quad Var[y] = \varphi b''(\eta)

    with :math:`b = \log(1 + e^\eta)` for answers, which are right, wrong or in between (then it is a
    quasi-likelihood), and :math:`b = \eta^2 / 2` for grades, which are normal.

    Attributes:
        offset: The score that corresponds to y = 0.
        scale: The difference of scores that corresponds to one unit of y.
        dispersion: :math:`\varphi`; for answers, their variance as a fraction of that of right-or-wrong ones.
        is_graded: Whether scores are grades.

    .. [McCullagh1989] P. McCullagh, J. Nelder. Generalized Linear Models. 1989.
    """

    offset: float = 0.0
    scale: float = 1.0
    dispersion: float = 1.0
    is_graded: bool = False

    def scaled(self, scores: FloatArray) -> FloatArray:
        """Scores in the units of the model; extreme grades are clipped."""
        y = (scores - self.offset) / self.scale
        return np.clip(y, -_FARTHEST * _NOISE, _FARTHEST * _NOISE) if self.is_graded else y

    def log_density(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """Logarithm of the density of ``y``, without terms that do not depend on ``eta``."""
        cumulant = eta**2 / 2.0 if self.is_graded else np.logaddexp(0.0, eta)
        density: FloatArray = (y * eta - cumulant) / self.dispersion
        return density

    def slope(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """First derivative of `log_density` in ``eta``."""
        return (y - self._mean(eta)) / self.dispersion

    def information(self, eta: FloatArray) -> FloatArray:
        """The information of one score: minus the second derivative of `log_density`."""
        p = expit(eta)
        curvature: FloatArray = np.ones_like(p) if self.is_graded else p * (1.0 - p)
        return curvature / self.dispersion

    def mean(self, eta: FloatArray) -> FloatArray:
        """Expected score, in the units of the metric."""
        return self.offset + self.scale * self._mean(eta)

    def variance(self, eta: FloatArray) -> FloatArray:
        """Variance of a score, in the units of the metric."""
        return (self.scale * self.dispersion) ** 2 * self.information(eta)

    def _mean(self, eta: FloatArray) -> FloatArray:
        mean: FloatArray = eta if self.is_graded else expit(eta)
        return mean


def grades(offset: float, scale: float) -> Likelihood:
    """The normal likelihood, in units in which the noise has the standard deviation 2."""
    return Likelihood(offset, scale, _NOISE**2, is_graded=True)


def likelihood_of(scores: FloatArray) -> Likelihood:
    """The likelihood for the given scores: answers if there are two values or a spread in [0, 1], or grades.

    Args:
        scores: ``m x N``; NaN where a configuration was not measured.
    """
    known = scores[np.isfinite(scores)]
    if not known.size:
        return Likelihood()
    low, high = float(known.min()), float(known.max())
    if low >= 0.0 and high <= 1.0 and (low == high or high - low >= _LEAST_RANGE):
        is_between = bool(np.any((known > 0.0) & (known < 1.0)))
        return Likelihood(dispersion=_dispersion(scores) if is_between else 1.0)
    if low < high and np.all((known == low) | (known == high)):
        return Likelihood(low, high - low)
    return grades(float(np.median(known)), _deviation(scores) / _NOISE)


def _dispersion(scores: FloatArray) -> float:
    """Variance of scores as a fraction of that of right-or-wrong answers with the same means."""
    fit, free = _fit(scores)
    seen = np.isfinite(scores)
    p = np.clip(fit, 0.02, 0.98)
    expected = float((p * (1.0 - p))[seen].sum()) * free
    return float(np.clip(((scores - fit)[seen] ** 2).sum() / expected, _LEAST_DISPERSION, 1.0))


def _deviation(scores: FloatArray) -> float:
    """Standard deviation of the noise of scores, by the median to ignore outliers; 1 if there is no noise."""
    near = _without_failures(scores)
    fit, free = _fit(near)
    known = scores[np.isfinite(scores)]
    residuals = (near - fit)[np.isfinite(scores)]
    return 1.4826 * float(np.median(np.abs(residuals))) / math.sqrt(free) or float(known.std()) or 1.0


def _without_failures(scores: FloatArray) -> FloatArray:
    """Clip extreme scores, which stand for failures and would leave the other scores no digits."""
    known = scores[np.isfinite(scores)]
    centre = float(np.median(known))
    distances = np.abs(known - centre)
    apart = distances[distances > 0.0]
    if not apart.size:
        return scores
    typical = float(np.median(distances)) or float(np.median(apart))
    cut: FloatArray = np.clip(scores, centre - _NEAR * typical, centre + _NEAR * typical)
    return cut


def _fit(scores: FloatArray) -> tuple[FloatArray, float]:
    """Fit of row and column effects, ``m x N``, by alternating means; and the fraction of free degrees."""
    seen = np.isfinite(scores)
    fit = np.zeros_like(scores)
    for _ in range(10):
        for axis in (1, 0):
            sums = np.where(seen, scores - fit, 0.0).sum(axis=axis, keepdims=True)
            fit = fit + sums / np.maximum(seen.sum(axis=axis, keepdims=True), 1)
    total = int(seen.sum())
    return fit, max(1, total - int(seen.any(axis=1).sum() + seen.any(axis=0).sum()) + 1) / total
