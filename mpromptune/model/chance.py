"""What choosing at random can expect to find: the best of a few configurations, in closed form."""

from __future__ import annotations

import numpy as np
import torch

from mpromptune.model.devices import plain_torch
from mpromptune.model.embedding import FloatArray

# NOTE: of the integral over normal distributions; its error is below a hundredth of their deviation.
_POINTS = 400
_DEVIATIONS = 5.0


@plain_torch()
def expected_best(means: FloatArray, stds: FloatArray, draws: int) -> FloatArray:
    r"""Expected maximum of k values drawn from N at random, without replacement.

    .. math:: E_k = \int t \, dP_k(t), \quad P_k(t) = \binom{N}{k}^{-1} e_k(\Phi_1(t), \dots, \Phi_N(t))

    with :math:`\Phi_i` the distribution of value i, by itself :math:`N(\mu_i, \sigma_i^2)`, and
    :math:`e_k` the elementary symmetric polynomial: the mean, over all sets of k, of the probability
    that none of them exceeds t. Where all deviations are 0 the result is exact:
    :math:`\sum_i \binom{i - 1}{k - 1} v_{(i)} / \binom{N}{k}` of the sorted values.

    Args:
        means: :math:`\mu`, length N.
        stds: :math:`\sigma`, length N.
        draws: The largest k; at most N.

    Returns:
        For k = 1, ..., ``draws``.
    """
    exact = not stds.any()
    points = np.sort(means) if exact else _grid(means, stds)
    below = _share_below(means, stds, points, draws)
    steps = below[:, :-1] if exact else (below[:, :-1] + below[:, 1:]) / 2
    best: FloatArray = points[-1] - steps @ np.diff(points)
    return best


def _grid(means: FloatArray, stds: FloatArray) -> FloatArray:
    low, high = (means - _DEVIATIONS * stds).min(), (means + _DEVIATIONS * stds).max()
    return np.linspace(low, high, _POINTS)


def _share_below(means: FloatArray, stds: FloatArray, points: FloatArray, draws: int) -> FloatArray:
    """``P_k`` at the points, ``draws x len(points)``, by taking in one value after the other.

    Of the sets of k among the first i values, i - k in i lack the i-th.
    """
    k = np.arange(1, draws + 1)[:, None]
    share = np.zeros((draws + 1, len(points)))
    share[0] = 1.0
    for i, (mean, std) in enumerate(zip(means, stds, strict=True), start=1):
        distribution = _normal(points - mean, std)
        share[1:] = (np.maximum(i - k, 0) * share[1:] + k * distribution * share[:-1]) / i
    return share[1:]


def _normal(above: FloatArray, std: float) -> FloatArray:
    """The distribution function; of a value that is certain, a step."""
    if std == 0.0:
        return (above >= 0.0).astype(np.float64)
    values: FloatArray = torch.special.ndtr(torch.from_numpy(above / std)).numpy()
    return values
