"""Additive effects of the parts of configurations: a Bayesian ridge regression of posterior means.

With parts ``f`` of configuration ``j``: ``mean_j = c + sum_f theta_f + e_j``, where ``theta_f ~ N(0, tau^2)``
and ``e_j ~ N(0, std_j^2 + misfit)``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from mpromptune.model.space import FloatArray

# NOTE: part of the variance of the means that is left to what does not add up. Configurations measured on all
# examples, whose deviation is 0, have a finite weight by it.
_MISFIT = 0.1
# Variance where all means are equal; then every draw is noise, and its scale does not matter.
_TINY = 1e-9


class Effects:
    """The posterior of the effects.

    Args:
        parts: The parts of each configuration: its demos, and its candidates of other components.
        means: Their posterior means.
        stds: Their posterior standard deviations.

    Attributes:
        mean: Posterior mean of the effect of each part, relative to the mean configuration.
    """

    def __init__(
        self, parts: Sequence[Sequence[Hashable]], means: Sequence[float], stds: Sequence[float]
    ) -> None:
        columns = {part: i for i, part in enumerate(dict.fromkeys(p for some in parts for p in some))}
        X, y = np.zeros((len(parts), len(columns))), np.asarray(means, float)
        for j, some in enumerate(parts):
            X[j, [columns[part] for part in some]] = 1.0
        spread = float(y.var()) + _TINY if len(y) else _TINY
        weights = 1.0 / (np.asarray(stds, float) ** 2 + _MISFIT * spread)
        if len(y):
            X, y = X - np.average(X, 0, weights), y - np.average(y, weights=weights)
        # The variance of the means is that of all parts of a configuration together.
        self._tau = np.sqrt(spread / max(float(np.mean([len(some) for some in parts] or [1])), 1.0))
        precision = X.T @ (weights[:, None] * X) + np.eye(len(columns)) / self._tau**2
        self._columns = columns
        self._factor: FloatArray = np.linalg.cholesky(precision)
        fitted = np.linalg.solve(precision, X.T @ (weights * y))
        self.mean: dict[Any, float] = dict(zip(columns, fitted.tolist(), strict=True))

    def draw(self, parts: Iterable[Hashable], rng: np.random.Generator) -> dict[Any, float]:
        """A draw of the effects of ``parts`` from their posterior, or from the prior if not measured."""
        noise = np.linalg.solve(self._factor.T, rng.standard_normal(len(self._columns)))
        return {
            part: self.mean[part] + noise[self._columns[part]]
            if part in self._columns
            else self._tau * rng.standard_normal()
            for part in parts
        }
