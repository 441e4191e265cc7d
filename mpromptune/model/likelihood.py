"""How scores vary around skill minus difficulty: right and wrong answers, or grades of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from mpromptune.model.space import FloatArray

# NOTE: a score that is not right or wrong is scaled so that its noise has this deviation: a right-or-wrong
# answer says no more of a logit, so that one prior serves both.
_NOISE = 2.0
# NOTE: deviations of the noise beyond which such a score is cut off: a configuration that is far worse than
# all others is known to be so, and the rest keep their scale.
_FARTHEST = 5.0
# NOTE: of scores between 0 and 1 that are answers: a metric that hardly moves there is a grade of its own.
_LEAST_RANGE = 0.1
# Typical distances from the median within which doubles keep enough digits for all scores.
_NEAR = 1e6
# NOTE: of a right-or-wrong answer's variance; scores in between vary less, but not by more than this.
_LEAST_DISPERSION = 0.05


@dataclass(frozen=True)
class Likelihood:
    r"""A generalised linear model with its natural link [McCullagh1989]_, of scaled scores y.

    .. math:: \log p(y | \eta) = (y \eta - b(\eta)) / \varphi + c(y), \quad
        E[y] = b'(\eta), \quad Var[y] = \varphi b''(\eta)

    with :math:`b = \log(1 + e^\eta)` for answers, which are right or wrong or between (a quasi-likelihood
    then), and :math:`b = \eta^2 / 2` for grades, which are normal.

    Attributes:
        offset: The score that is 0 to the model.
        scale: The score's difference for one unit.
        dispersion: :math:`\varphi`; of answers, their variance as a part of what right-or-wrong ones have.
        is_graded: Whether scores are grades.

    .. [McCullagh1989] P. McCullagh, J. Nelder. Generalized Linear Models. 1989.
    """

    offset: float = 0.0
    scale: float = 1.0
    dispersion: float = 1.0
    is_graded: bool = False

    def scaled(self, scores: FloatArray) -> FloatArray:
        """Scores in the units of the model; grades are cut off where they are far from all others."""
        y = (scores - self.offset) / self.scale
        return np.clip(y, -_FARTHEST * _NOISE, _FARTHEST * _NOISE) if self.is_graded else y

    def log_density(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """Logarithm of the density of ``y``, but for what does not depend on ``eta``."""
        cumulant = eta**2 / 2.0 if self.is_graded else np.logaddexp(0.0, eta)
        density: FloatArray = (y * eta - cumulant) / self.dispersion
        return density

    def slope(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """First derivative of `log_density` in ``eta``."""
        return (y - self._mean(eta)) / self.dispersion

    def information(self, eta: FloatArray) -> FloatArray:
        """Minus its second derivative; what one score says."""
        p = expit(eta)
        curvature: FloatArray = np.ones_like(p) if self.is_graded else p * (1.0 - p)
        return curvature / self.dispersion

    def mean(self, eta: FloatArray) -> FloatArray:
        """Expected score, as the metric has it."""
        return self.offset + self.scale * self._mean(eta)

    def variance(self, eta: FloatArray) -> FloatArray:
        """Variance of a score, as the metric has it."""
        return (self.scale * self.dispersion) ** 2 * self.information(eta)

    def _mean(self, eta: FloatArray) -> FloatArray:
        mean: FloatArray = eta if self.is_graded else expit(eta)
        return mean


def grades(offset: float, scale: float) -> Likelihood:
    """The normal likelihood, in units in which the noise has the deviation 2."""
    return Likelihood(offset, scale, _NOISE**2, is_graded=True)


def likelihood_of(scores: FloatArray) -> Likelihood:
    """What the scores themselves call for: answers where they are two values, or spread over [0, 1].

    Args:
        scores: ``m x N``, not a number where a configuration was not measured.
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
    """How much less scores vary than right and wrong answers with their means would."""
    fit, free = _fit(scores)
    seen = np.isfinite(scores)
    p = np.clip(fit, 0.02, 0.98)
    expected = float((p * (1.0 - p))[seen].sum()) * free
    return float(np.clip(((scores - fit)[seen] ** 2).sum() / expected, _LEAST_DISPERSION, 1.0))


def _deviation(scores: FloatArray) -> float:
    """The noise of scores, by the median: outliers do not count; 1 where there is none."""
    near = _without_failures(scores)
    fit, free = _fit(near)
    known = scores[np.isfinite(scores)]
    residuals = (near - fit)[np.isfinite(scores)]
    return 1.4826 * float(np.median(np.abs(residuals))) / math.sqrt(free) or float(known.std()) or 1.0


def _without_failures(scores: FloatArray) -> FloatArray:
    """Scores that stand for a failure, by a size that leaves the others no digit, are brought nearer."""
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
    """What rows and columns explain, ``m x N``, by alternating means, and the share of free degrees."""
    seen = np.isfinite(scores)
    fit = np.zeros_like(scores)
    for _ in range(10):
        for axis in (1, 0):
            sums = np.where(seen, scores - fit, 0.0).sum(axis=axis, keepdims=True)
            fit = fit + sums / np.maximum(seen.sum(axis=axis, keepdims=True), 1)
    total = int(seen.sum())
    return fit, max(1, total - int(seen.any(axis=1).sum() + seen.any(axis=0).sum()) + 1) / total
