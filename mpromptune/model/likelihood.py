"""How scores vary around skill minus difficulty: right and wrong answers, or grades of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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


class Likelihood(Protocol):
    """How scores vary around skill minus difficulty."""

    def scaled(self, scores: FloatArray) -> FloatArray:
        """Scores in the units of the model."""

    def log_density(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """Logarithm of the density of ``y``, but for what does not depend on ``eta``."""

    def slope(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """First derivative of `log_density` in ``eta``."""

    def information(self, eta: FloatArray) -> FloatArray:
        """Minus its second derivative; what one score says."""

    def mean(self, eta: FloatArray) -> FloatArray:
        """Expected score, as the metric has it."""

    def variance(self, eta: FloatArray) -> FloatArray:
        """Variance of a score, as the metric has it."""


@dataclass(frozen=True)
class Answers:
    """Right or wrong, or between: ``low`` and ``high`` are 0 and 1 to the model.

    Attributes:
        low: The score of a wrong answer.
        high: That of a right one.
        dispersion: Variance of scores, as a part of what right-or-wrong answers have.
    """

    low: float = 0.0
    high: float = 1.0
    dispersion: float = 1.0

    def scaled(self, scores: FloatArray) -> FloatArray:
        """To [0, 1]."""
        return (scores - self.low) / (self.high - self.low)

    def log_density(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """Bernoulli's, and a quasi-likelihood for scores in between."""
        density: FloatArray = (y * eta - np.logaddexp(0.0, eta)) / self.dispersion
        return density

    def slope(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """Observed minus expected."""
        slope: FloatArray = (y - expit(eta)) / self.dispersion
        return slope

    def information(self, eta: FloatArray) -> FloatArray:
        """``p (1 - p)``."""
        p = expit(eta)
        information: FloatArray = p * (1.0 - p) / self.dispersion
        return information

    def mean(self, eta: FloatArray) -> FloatArray:
        """``logit^-1``, between low and high."""
        mean: FloatArray = self.low + (self.high - self.low) * expit(eta)
        return mean

    def variance(self, eta: FloatArray) -> FloatArray:
        """Bernoulli's, as far as scores vary."""
        return ((self.high - self.low) * self.dispersion) ** 2 * self.information(eta)


@dataclass(frozen=True)
class Grades:
    """Any numbers, normal around skill minus difficulty.

    Attributes:
        centre: The score of skill minus difficulty 0.
        unit: The score's difference for one unit of skill.
    """

    centre: float
    unit: float

    def scaled(self, scores: FloatArray) -> FloatArray:
        """Cut off where they are far from all others."""
        limit = _FARTHEST * _NOISE
        scaled: FloatArray = np.clip((scores - self.centre) / self.unit, -limit, limit)
        return scaled

    def log_density(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """Normal."""
        density: FloatArray = -0.5 * ((y - eta) / _NOISE) ** 2
        return density

    def slope(self, eta: FloatArray, y: FloatArray) -> FloatArray:
        """The residual, in units of the noise."""
        return (y - eta) / _NOISE**2

    def information(self, eta: FloatArray) -> FloatArray:
        """The same for all."""
        return np.full_like(eta, 1.0 / _NOISE**2)

    def mean(self, eta: FloatArray) -> FloatArray:
        """Linear."""
        return self.centre + self.unit * eta

    def variance(self, eta: FloatArray) -> FloatArray:
        """The same for all."""
        return np.full_like(eta, (self.unit * _NOISE) ** 2)


def likelihood_of(scores: FloatArray) -> Likelihood:
    """What the scores themselves call for: `Answers` where they are two values, or spread over [0, 1].

    Args:
        scores: ``m x N``, not a number where a configuration was not measured.
    """
    known = scores[np.isfinite(scores)]
    if not known.size:
        return Answers()
    low, high = float(known.min()), float(known.max())
    if low >= 0.0 and high <= 1.0 and (low == high or high - low >= _LEAST_RANGE):
        return Answers(dispersion=_dispersion(scores) if np.any((known > 0.0) & (known < 1.0)) else 1.0)
    if low < high and np.all((known == low) | (known == high)):
        return Answers(low, high)
    return Grades(float(np.median(known)), _deviation(scores) / _NOISE)


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


def _residuals(scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What configurations and examples do not explain, and the fit, by alternating means; ``m x N`` each."""
    fit = np.zeros_like(scores)
    for _ in range(10):
        fit = fit + _means(scores - fit, axis=1)
        fit = fit + _means(scores - fit, axis=0)
    return scores - fit, fit


def _means(values: FloatArray, axis: int) -> FloatArray:
    seen = np.isfinite(values)
    sums = np.where(seen, values, 0.0).sum(axis=axis, keepdims=True)
    means: FloatArray = sums / np.maximum(seen.sum(axis=axis, keepdims=True), 1)
    return means


def _dispersion(scores: FloatArray) -> float:
    """How much less scores vary than right and wrong answers with their means would."""
    residuals, fit = _residuals(scores)
    seen = np.isfinite(scores)
    p = np.clip(fit, 0.02, 0.98)
    expected = float((p * (1.0 - p))[seen].sum())
    left = max(1, int(seen.sum() - seen.any(axis=1).sum() - seen.any(axis=0).sum() + 1)) / seen.sum()
    return float(np.clip((residuals[seen] ** 2).sum() / (expected * left), _LEAST_DISPERSION, 1.0))


def _deviation(scores: FloatArray) -> float:
    """The noise of scores, by the median: outliers do not count; 1 where there is none."""
    seen = np.isfinite(scores)
    residuals = _residuals(_without_failures(scores))[0][seen]
    free = max(1, len(residuals) - int(seen.any(axis=1).sum() + seen.any(axis=0).sum()) + 1)
    found = 1.4826 * float(np.median(np.abs(residuals))) * math.sqrt(len(residuals) / free)
    known = scores[seen]
    return found or float(known.std()) or 1.0
