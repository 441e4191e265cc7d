r"""Statistics of a search: noise, the expected best of random choices, and the effect of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr

from mpromptune.model.beliefs import Beliefs
from mpromptune.model.embedding import Geometry
from mpromptune.model.space import FloatArray, IndexArray

# NOTE: larger values stand for failures: scaled by the standard deviation, all others would lose their
# digits. float32, in which BoTorch has some constants, ends at 3.4e38.
LARGEST = 1e30
# NOTE: for the integral over normal distributions; its error is below 0.01 standard deviations.
_POINTS, _DEVIATIONS = 400, 5.0
# NOTE: the smallest possible p-value is 1/500.
_PERMUTATIONS = 499
# NOTE: fewer candidates have at most six permutations, too few for a test.
_LEAST_CANDIDATES = 4


def pooled_variance(samples: Sequence[FloatArray]) -> float:
    """Variance within samples, pooled over samples; of all scores if no sample has two."""
    df = sum(len(scores) - 1 for scores in samples)
    if not df:
        return float(np.var(np.concatenate(samples)))
    return sum(float(((scores - scores.mean()) ** 2).sum()) for scores in samples) / df


def expected_best(means: FloatArray, stds: FloatArray, draws: int) -> FloatArray:
    r"""Expected maximum of k values drawn at random from N, without replacement.

    .. math:: E_k = \int t \, dP_k(t), \quad P_k(t) = \binom{N}{k}^{-1} e_k(\Phi_1(t), \dots, \Phi_N(t))

    with :math:`\Phi_i` the distribution function of value i, :math:`N(\mu_i, \sigma_i^2)`, and :math:`e_k`
    the elementary symmetric polynomial. :math:`P_k` is the mean, over all sets of k values, of the
    probability that none of them exceeds t. If all deviations are 0, the result is exact:
    :math:`\sum_i \binom{i - 1}{k - 1} v_{(i)} / \binom{N}{k}` of the sorted values.

    Args:
        means: :math:`\mu`, length N.
        stds: :math:`\sigma`, length N.
        draws: The largest k; at most N.

    Returns:
        The expected maxima for k = 1, ..., ``draws``.
    """
    exact = not stds.any()
    low, high = (means - _DEVIATIONS * stds).min(), (means + _DEVIATIONS * stds).max()
    points = np.sort(means) if exact else np.linspace(low, high, _POINTS)
    # P_k, one value after another: of the sets of k among the first i values, (i - k) / i lack the i-th.
    k = np.arange(1, draws + 1)[:, None]
    below = np.zeros((draws + 1, len(points)))
    below[0] = 1.0
    for i, (mean, std) in enumerate(zip(means, stds, strict=True), start=1):
        distribution = ndtr((points - mean) / std) if std else points >= mean
        below[1:] = (np.maximum(i - k, 0) * below[1:] + k * distribution * below[:-1]) / i
    steps = below[1:, :-1] if exact else (below[1:, :-1] + below[1:, 1:]) / 2
    best: FloatArray = points[-1] - steps @ np.diff(points)
    return best


def chance_of_likeness(beliefs: Beliefs, geometries: Sequence[Geometry], seed: int = 0) -> float | None:
    r"""Fraction of random assignments of embeddings to candidates that explain as much as the real one.

    It is the p-value of a score test, by permutation, of the variance component that texts add [Lin1997]_.
    The statistic of a component c is

    .. math:: Q_c = v_c^T S_c v_c, \quad v_c = Z_c^T K^{-1} \hat u,

    with :math:`\hat u` and K the latents of the measured configurations and their prior covariance without
    texts (see `rasch`), :math:`Z_c` 1 where a latent has a candidate, and :math:`S_c` the similarities of
    candidates by their texts, :math:`\exp(-d^2 / 2)`, 0 on the diagonal. It is large if candidates with
    similar texts deviate similarly. The statistics of components are summed in units of their standard
    deviations under permutation. Only measured candidates and views of the embedder are used.

    Args:
        beliefs: Fitted to the scores.
        geometries: Geometries of the components, with their texts.
        seed: Seed of the permutations.

    Returns:
        Near 0 if similar texts have similar scores; uniform in [0, 1] if texts do not matter. None if no
        component has four measured candidates with different texts.

    .. [Lin1997] X. Lin. Variance component testing in generalised linear models with random effects.
        Biometrika 84(2), 1997.
    """
    blind = beliefs.without_similarity()
    weights = blind.split(blind.posterior.weights)
    rng = np.random.default_rng(seed)
    parts = []
    for group, rows, own in zip(beliefs.groups, blind.rows, weights, strict=True):
        for c, lineage in zip(group.components, group.lineages, strict=True):
            roots = lineage.roots(rows[:, c])  # the texts of proposed candidates are not embedded
            has_text = roots < lineage.initial
            if geometries[c].has_text and len(set(roots[has_text].tolist())) >= _LEAST_CANDIDATES:
                parts.append(_permuted(roots[has_text], own[has_text], geometries[c], rng))
    if not parts:
        return None
    total = np.sum(parts, axis=0)
    return float(np.mean(total >= total[0]))


def _permuted(
    chosen: IndexArray, weights: FloatArray, geometry: Geometry, rng: np.random.Generator
) -> FloatArray:
    """The statistic of the data and of each permutation, in units of their standard deviation."""
    measured, places = np.unique(chosen, return_inverse=True)
    v = np.bincount(places, weights)
    similar = np.exp(-geometry.views[0].cpu().numpy()[np.ix_(measured, measured)] / 2.0)
    np.fill_diagonal(similar, 0.0)
    dealt = np.stack([v, *(rng.permutation(v) for _ in range(_PERMUTATIONS))])
    statistics: FloatArray = np.einsum("pi,ij,pj->p", dealt, similar, dealt, optimize=True)
    statistics -= statistics[1:].mean()
    scale = float(statistics[1:].std())
    return statistics / scale if scale > 0.0 else statistics
